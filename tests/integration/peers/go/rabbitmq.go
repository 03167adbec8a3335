package main

import (
	"context"
	"errors"
	"maps"
	"strings"

	amqp "github.com/rabbitmq/amqp091-go"
)

func openChannel(url string) (*amqp.Channel, error) {
	connection, err := amqp.Dial(url)
	if err != nil {
		return nil, err
	}
	return connection.Channel()
}

// The name is a queue, or `exchange/routing key` for a queue of our own.
func listenQueue(ctx context.Context, url, name string) (func() (Message, error), error) {
	channel, err := openChannel(url)
	if err != nil {
		return nil, err
	}
	queue := name
	if exchange, routingKey, found := strings.Cut(name, "/"); found {
		retaining := amqp.Table{"alternate-exchange": exchange + ":retained"}
		if err := channel.ExchangeDeclare(exchange, "topic", true, false, false, false, retaining); err != nil {
			return nil, err
		}
		declared, err := channel.QueueDeclare("", false, true, true, false, nil)
		if err != nil {
			return nil, err
		}
		queue = declared.Name
		if err := channel.QueueBind(queue, routingKey, exchange, false, nil); err != nil {
			return nil, err
		}
	}
	deliveries, err := channel.Consume(queue, "", false, false, false, false, nil)
	return func() (Message, error) {
		delivery, ok := <-deliveries
		if !ok {
			return Message{}, errors.New("RabbitMQ has closed the channel")
		}
		headers := map[string]any(delivery.Headers)
		key, isText := headers["key"].(string)
		if isText {
			delete(headers, "key")
		}
		properties := map[string]string{
			"contentType": delivery.ContentType, "messageId": delivery.MessageId, "type": delivery.Type,
		}
		message := Message{Body: delivery.Body, Key: []byte(key), Headers: headers, Beside: properties}
		return message, delivery.Ack(false)
	}, err
}

func exchangeSender(ctx context.Context, url, name string) (func(Message) error, error) {
	exchange, routingKey, _ := strings.Cut(name, "/")
	channel, err := openChannel(url)
	if err != nil {
		return nil, err
	}
	err = channel.Confirm(false)
	return func(message Message) error {
		properties := amqp.Publishing{DeliveryMode: amqp.Persistent}
		if odd, ok := message.Beside.(amqp.Publishing); ok {
			properties = odd
		}
		properties.Body, properties.Headers = message.Body, amqp.Table{}
		maps.Copy(properties.Headers, message.Headers)
		if message.Key != nil {
			properties.Headers["key"] = string(message.Key)
		}
		confirm, err := channel.PublishWithDeferredConfirm(exchange, routingKey, false, false, properties)
		if err != nil {
			return err
		}
		if !confirm.Wait() {
			return errors.New("RabbitMQ has not stored it")
		}
		return nil
	}, err
}
