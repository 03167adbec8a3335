package main

import (
	"context"
	"errors"
	"time"

	"github.com/redis/go-redis/v9"
)

func connect(url string) (*redis.Client, error) {
	options, err := redis.ParseURL(url)
	if err != nil {
		return nil, err
	}
	return redis.NewClient(options), nil
}

func listenPubSub(ctx context.Context, url, channel string) (func() (Message, error), error) {
	client, err := connect(url)
	if err != nil {
		return nil, err
	}
	subscription := client.Subscribe(ctx, channel)
	if _, err := subscription.Receive(ctx); err != nil { // Redis has confirmed the subscription
		return nil, err
	}
	messages := subscription.Channel()
	return func() (Message, error) {
		received := <-messages
		return Message{Body: []byte(received.Payload)}, nil
	}, nil
}

func pubSubSender(ctx context.Context, url, channel string) (func(Message) error, error) {
	client, err := connect(url)
	return func(message Message) error {
		return client.Publish(ctx, channel, message.Body).Err()
	}, err
}

func listenStream(ctx context.Context, url, stream string) (func() (Message, error), error) {
	const group = "go"
	client, err := connect(url)
	if err != nil {
		return nil, err
	}
	if err := client.XGroupCreateMkStream(ctx, stream, group, "0").Err(); err != nil {
		return nil, err
	}
	return func() (Message, error) {
		for {
			streams := []string{stream, ">"}
			read := redis.XReadGroupArgs{Group: group, Consumer: "me", Streams: streams, Count: 1, Block: time.Second}
			found, err := client.XReadGroup(ctx, &read).Result()
			if errors.Is(err, redis.Nil) {
				continue // nothing within the second
			}
			if err != nil {
				return Message{}, err
			}
			entry := found[0].Messages[0]
			message := Message{Headers: entry.Values}
			if body, ok := entry.Values["body"].(string); ok {
				message.Body = []byte(body)
			}
			if key, ok := entry.Values["key"].(string); ok {
				message.Key = []byte(key)
			}
			delete(message.Headers, "body")
			delete(message.Headers, "key")
			return message, client.XAck(ctx, stream, group, entry.ID).Err()
		}
	}, nil
}

func streamSender(ctx context.Context, url, stream string) (func(Message) error, error) {
	client, err := connect(url)
	return func(message Message) error {
		fields := []any{"body", message.Body}
		if odd, ok := message.Beside.([]any); ok {
			fields = odd
		}
		if message.Key != nil {
			fields = append(fields, "key", message.Key)
		}
		for name, value := range message.Headers {
			fields = append(fields, name, value)
		}
		return client.XAdd(ctx, &redis.XAddArgs{Stream: stream, Values: fields}).Err()
	}, err
}
