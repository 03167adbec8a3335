package main

import (
	"encoding/json"
	"math"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/twmb/franz-go/pkg/kgo"
)

// What a Go program may send: the documented form, and odd things with it.
var cases = map[string]func(keys []string) []Message{
	"documented":        documented,
	"documented-pubsub": documentedPubSub,
	"pubsub":            oddChannels,
	"bodies":            oddBodies,
	"streams":           oddEntries,
	"rabbitmq":          oddProperties,
	"kafka":             oddRecords,
	"keys":              keyed,
}

func encoded(value any) []byte {
	body, err := json.Marshal(value)
	must(err)
	return body
}

func plain(name string) []byte {
	return encoded(wrapped(UserJoined{UserID: 1, Case: name}))
}

func documented([]string) []Message {
	headers := map[string]any{"tenant": "7", "traceparent": "00-ab-cd-01"}
	return []Message{
		{Case: "plain", Body: plain("plain")},
		{Case: "key", Body: plain("key"), Key: []byte("Schlüssel")},
		{Case: "headers", Body: plain("headers"), Key: []byte("7"), Headers: headers},
	}
}

// The same, where the service has no headers: they stand in the body.
func documentedPubSub([]string) []Message {
	key, headers := wrapped(UserJoined{UserID: 1, Case: "key"}), wrapped(UserJoined{UserID: 1, Case: "headers"})
	key.Headers = map[string]string{"key": "Schlüssel"}
	headers.Headers = map[string]string{"key": "7", "tenant": "7", "traceparent": "00-ab-cd-01"}
	return []Message{
		{Case: "plain", Body: plain("plain")},
		{Case: "key", Body: encoded(key)},
		{Case: "headers", Body: encoded(headers)},
	}
}

func oddChannels([]string) []Message {
	return []Message{
		{Case: "null-headers", Body: nullHeaders("null-headers")},
		{Case: "bytes", Body: []byte{0, 255}},
		{Case: "last", Body: plain("last")},
	}
}

// A nil map without `omitempty` is null.
func nullHeaders(name string) []byte {
	type Headed struct {
		Envelope
		Headers map[string]string `json:"headers"`
	}
	return encoded(Headed{Envelope: wrapped(UserJoined{UserID: 1, Case: name})})
}

func oddBodies([]string) []Message {
	with := func(name string, change func(*UserJoined)) Message {
		event := UserJoined{UserID: 1, Case: name}
		change(&event)
		return Message{Case: name, Body: encoded(wrapped(event))}
	}
	replaced := func(name, old, new string) Message {
		return Message{Case: name, Body: []byte(strings.Replace(string(plain(name)), old, new, 1))}
	}
	joined := func(name, form string) Message {
		at := time.Date(2026, 1, 2, 3, 4, 5, 678901234, time.FixedZone("", 2*60*60)).Format(form)
		return replaced(name, `"user_id"`, `"joined_at":"`+at+`","user_id"`)
	}
	zeroTime := wrapped(UserJoined{UserID: 1, Case: "zero-time"})
	event := zeroTime.Payload.(UserJoined)
	event.EventTimestamp = time.Time{}
	zeroTime.Payload = event
	return []Message{
		{Case: "null-headers", Body: nullHeaders("null-headers")},
		replaced("null-tags", `"user_id"`, `"tags":null,"user_id"`), // a nil slice without `omitempty`
		with("html", func(event *UserJoined) { event.Note = "<a & b> \u2028" }),
		with("not-unicode", func(event *UserJoined) { event.Note = "gr\xfcn" }),
		with("largest-integer", func(event *UserJoined) { event.UserID = math.MaxInt64 }),
		with("bytes", func(event *UserJoined) { event.Photo = []byte{0, 255} }),
		with("large-number-as-text", func(event *UserJoined) { event.Account = "9223372036854775808" }),
		with("decimal-as-text", func(event *UserJoined) { event.Balance = "12.30" }),
		joined("nanoseconds-and-offset", time.RFC3339Nano),
		joined("seconds", time.RFC3339),
		joined("date-only", time.DateOnly),
		joined("mail-date", time.RFC1123Z),
		{Case: "zero-time", Body: encoded(zeroTime)},
		replaced("go-names", "message_name", "MessageName"),
		{Case: "trailing-zeros", Body: append(plain("trailing-zeros"), 0, 0)},
		{Case: "last", Body: plain("last")},
	}
}

func oddEntries([]string) []Message {
	return []Message{
		{Case: "no-body", Beside: []any{"data", plain("no-body")}},
		{Case: "binary-field", Beside: []any{"body", plain("binary-field"), "gr\xfcn", []byte{255, 0}}},
		{Case: "number-field", Beside: []any{"retry", 5, "body", plain("number-field")}},
		{Case: "last", Body: plain("last")},
	}
}

func oddProperties([]string) []Message {
	headed := func(name string, headers map[string]any) Message {
		return Message{Case: name, Body: plain(name), Headers: headers}
	}
	with := func(name string, properties amqp.Publishing) Message {
		return Message{Case: name, Body: plain(name), Beside: properties}
	}
	typed := map[string]any{
		"flag": true, "int8": int8(-3), "uint8": byte(200), "int16": int16(300), "int32": int32(70000),
		"int64": int64(1) << 60, "int": 5, "float32": float32(0.5), "float64": 1234567.891,
		"decimal": amqp.Decimal{Scale: 2, Value: 150}, "bytes": []byte{0, 255}, "at": time.Unix(1796016343, 0),
		"nothing": nil, "table": amqp.Table{"x": []byte{255}}, "list": []any{int32(1), "a", 0.1}, "latin-1": "Z\xfcrich",
	}
	nested := any("deep")
	for range 40 {
		nested = amqp.Table{"x": nested}
	}
	return []Message{
		with("transient", amqp.Publishing{DeliveryMode: amqp.Transient}),
		with("properties", amqp.Publishing{
			Timestamp: time.Now(), MessageId: "id-1", AppId: "go", Type: "t", CorrelationId: "c", ReplyTo: "r",
			Priority: 9, Expiration: "120000",
		}),
		headed("typed-headers", typed),
		{Case: "garbage-with-headers", Body: []byte("not json"), Headers: typed},
		headed("binary-key", map[string]any{"key": []byte{255, 254}}),
		headed("table-key", map[string]any{"key": amqp.Table{"x": int64(1)}}),
		headed("latin-1-header", map[string]any{"city": "Z\xfcrich"}),
		headed("nested-tables", map[string]any{"x": nested}),
		headed("negative-decimal", map[string]any{"price": amqp.Decimal{Scale: 2, Value: -150}}),
		headed("huge-double", map[string]any{"size": 1e300}),
		with("binary-correlation-id", amqp.Publishing{CorrelationId: "\xff\xfe\x01"}),
		headed("latin-1-header-name", map[string]any{"gr\xfcn": "x"}),
		with("time-before-1970", amqp.Publishing{Timestamp: time.Date(1969, 1, 1, 0, 0, 0, 0, time.UTC)}),
		headed("zero-time", map[string]any{"at": time.Time{}}),
		headed("long-header-name", map[string]any{strings.Repeat("k", 200): "v"}),
		{Case: "empty", Body: []byte{}},
		{Case: "gzip", Body: []byte{0x1f, 0x8b, 8, 0}, Beside: amqp.Publishing{ContentEncoding: "gzip"}},
		{Case: "large", Body: append(plain("large"), make([]byte, 2<<20)...)},
		{Case: "last", Body: plain("last")},
	}
}

func oddRecords([]string) []Message {
	compressed := func(name string, codec kgo.CompressionCodec) Message {
		return Message{Case: name, Body: plain(name), Beside: compressedBy(codec)}
	}
	headed := func(name string, headers map[string]any) Message {
		return Message{Case: name, Body: plain(name), Headers: headers}
	}
	return []Message{
		{Case: "default-compression", Body: plain("default-compression")},
		compressed("none", kgo.NoCompression()),
		compressed("gzip", kgo.GzipCompression()),
		compressed("snappy", kgo.SnappyCompression()),
		compressed("lz4", kgo.Lz4Compression()),
		compressed("zstd", kgo.ZstdCompression()),
		{Case: "after-an-aborted-one", Body: plain("after-an-aborted-one"), Beside: oddly(twice)},
		{Case: "null-value", Key: []byte("k")},
		{Case: "empty-key", Body: plain("empty-key"), Key: []byte{}},
		{Case: "binary-key", Body: plain("binary-key"), Key: []byte{255, 254, 0}},
		headed("null-header", map[string]any{"tenant": nil}),
		headed("binary-header", map[string]any{"digest": []byte{255, 0, 1}}),
		headed("latin-1-header-name", map[string]any{"gr\xfcn": "x"}),
		headed("key-header", map[string]any{"key": "another"}),
		{Case: "schema-registry", Body: append([]byte{0, 0, 0, 0, 7}, plain("schema-registry")...)},
		{Case: "last", Body: plain("last")},
	}
}

// One message for each key.
func keyed(keys []string) []Message {
	messages := []Message{}
	for _, key := range keys {
		messages = append(messages, Message{Case: key, Body: plain("keys"), Key: []byte(key)})
	}
	return messages
}
