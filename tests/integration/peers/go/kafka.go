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
		client := client
		if codec, ok := message.Beside.(kgo.CompressionCodec); ok {
			if client, err = kgo.NewClient(seeds, kgo.ProducerBatchCompression(codec)); err != nil {
				return err
			}
			defer client.Close()
		}
		headers := recordHeaders(message.Headers)
		record := &kgo.Record{Topic: topic, Key: message.Key, Value: message.Body, Headers: headers}
		return client.ProduceSync(ctx, record).FirstErr()
	}, err
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
