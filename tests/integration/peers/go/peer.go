// The program reads commands from its standard input, one JSON object a line, and answers each with a line.
package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
)

// Message is a message of any transport. A header is a text, except where a case needs another type.
type Message struct {
	Case      string
	Body      []byte
	Key       []byte
	Headers   map[string]any
	Partition int32
	Beside    any // what only one transport has
}

// Transport is one way to send and receive.
type Transport struct {
	// Listen begins to receive, and returns a function that returns the next message.
	Listen func(ctx context.Context, address, name string) (func() (Message, error), error)
	// Sender connects, and returns a function that sends.
	Sender func(ctx context.Context, address, name string) (func(Message) error, error)
}

var transports = map[string]Transport{
	"pubsub":   {listenPubSub, pubSubSender},
	"streams":  {listenStream, streamSender},
	"rabbitmq": {listenQueue, exchangeSender},
	"kafka":    {listenTopic, topicSender},
}

// Command is a line of the standard input: listen, read, move or send.
type Command struct {
	Do, Transport, Address, Name, To, Which string
	Keys                                    []string
	Raw                                     bool // the body may be anything
}

// Answer is a line of the standard output.
type Answer struct {
	Body      []byte            `json:"body"`
	Key       string            `json:"key,omitempty"`
	Headers   map[string]string `json:"headers,omitempty"`
	Partition int32             `json:"partition"`
	Beside    any               `json:"properties,omitempty"`
	Event     *Read             `json:"event,omitempty"`
	Sent      [][3]any          `json:"sent,omitempty"` // names, bodies and headers
}

var listening = map[string]func() (Message, error){}

func answer(ctx context.Context, command Command) (answer Answer, err error) {
	switch command.Do {
	case "listen":
		listening[command.Name], err = transports[command.Transport].Listen(ctx, command.Address, command.Name)
	case "read":
		var message Message
		if message, err = listening[command.Name](); err != nil {
			return
		}
		answer = Answer{Body: message.Body, Key: string(message.Key), Partition: message.Partition, Beside: message.Beside}
		answer.Headers = texts(message.Headers)
		if !command.Raw {
			answer.Event, err = parse(message.Body)
		}
	case "move": // the next message, to another place
		var send func(Message) error
		if send, err = transports[command.Transport].Sender(ctx, command.Address, command.To); err != nil {
			return
		}
		var message Message
		if message, err = listening[command.Name](); err == nil {
			err = send(Message{Body: message.Body, Key: message.Key, Headers: message.Headers})
		}
	case "send":
		var send func(Message) error
		if send, err = transports[command.Transport].Sender(ctx, command.Address, command.Name); err != nil {
			return
		}
		for _, message := range cases[command.Which](command.Keys) {
			if err = send(message); err != nil {
				return answer, fmt.Errorf("%s: %w", message.Case, err)
			}
			answer.Sent = append(answer.Sent, [3]any{message.Case, message.Body, texts(message.Headers)})
		}
	}
	return
}

func texts(headers map[string]any) map[string]string {
	found := map[string]string{}
	for name, value := range headers {
		found[name] = fmt.Sprint(value)
	}
	return found
}

func newID() string {
	var id [16]byte
	rand.Read(id[:])
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var command Command
		must(json.Unmarshal(lines.Bytes(), &command))
		answered, err := answer(context.Background(), command)
		must(err)
		must(json.NewEncoder(os.Stdout).Encode(answered))
	}
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "go peer:", err)
		os.Exit(1)
	}
}
