package main

import (
	"context"
	"strings"

	"github.com/twmb/franz-go/pkg/kgo"
)

func listenTopic(ctx context.Context, servers, topic string) (func() (Message, error), error) {
	client, err := kgo.NewClient(
		kgo.SeedBrokers(strings.Split(servers, ",")...),
		kgo.ConsumeTopics(topic),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
	)
	return func() (Message, error) {
		fetched := client.PollRecords(ctx, 1)
		if err := fetched.Err(); err != nil {
			return Message{}, err
		}
		record := fetched.Records()[0]
		headers := map[string]any{}
		for _, header := range record.Headers {
			headers[header.Key] = string(header.Value)
		}
		return Message{Body: record.Value, Key: record.Key, Headers: headers, Partition: record.Partition}, nil
	}, err
}

// Its default partitioner is that of Java, murmur2, as diator's.
func topicSender(ctx context.Context, servers, topic string) (func(Message) error, error) {
	seeds := kgo.SeedBrokers(strings.Split(servers, ",")...)
	client, err := kgo.NewClient(seeds)
	return func(message Message) error {
		if send, ok := message.Beside.(oddly); ok {
			return send(ctx, seeds, topic, message.Body)
		}
		headers := recordHeaders(message.Headers)
		record := &kgo.Record{Topic: topic, Key: message.Key, Value: message.Body, Headers: headers}
		return client.ProduceSync(ctx, record).FirstErr()
	}, err
}

// oddly is another way to send.
type oddly func(ctx context.Context, seeds kgo.Opt, topic string, body []byte) error

func compressedBy(codec kgo.CompressionCodec) oddly {
	return func(ctx context.Context, seeds kgo.Opt, topic string, body []byte) error {
		client, err := kgo.NewClient(seeds, kgo.ProducerBatchCompression(codec))
		if err != nil {
			return err
		}
		defer client.Close()
		return client.ProduceSync(ctx, &kgo.Record{Topic: topic, Value: body}).FirstErr()
	}
}

// The message is sent in a transaction that is aborted, and then in one that is committed.
func twice(ctx context.Context, seeds kgo.Opt, topic string, body []byte) error {
	client, err := kgo.NewClient(seeds, kgo.TransactionalID(newID()))
	if err != nil {
		return err
	}
	defer client.Close()
	for _, end := range []kgo.TransactionEndTry{kgo.TryAbort, kgo.TryCommit} {
		if err := client.BeginTransaction(); err != nil {
			return err
		}
		if err := client.ProduceSync(ctx, &kgo.Record{Topic: topic, Value: body}).FirstErr(); err != nil {
			return err
		}
		if err := client.EndTransaction(ctx, end); err != nil {
			return err
		}
	}
	return nil
}

func recordHeaders(headers map[string]any) (found []kgo.RecordHeader) {
	for name, value := range headers {
		header := kgo.RecordHeader{Key: name}
		switch value := value.(type) {
		case string:
			header.Value = []byte(value)
		case []byte:
			header.Value = value
		}
		found = append(found, header)
	}
	return found
}
