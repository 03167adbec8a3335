package main

import (
	"encoding/json"
	"time"
)

// Envelope is a message as it is on the wire.
type Envelope struct {
	MessageType string            `json:"message_type"`
	MessageName string            `json:"message_name"`
	MessageID   string            `json:"message_id"`
	Payload     any               `json:"payload"`
	Headers     map[string]string `json:"headers,omitempty"`
}

// UserJoined is the event of the tests.
type UserJoined struct {
	EventID        string    `json:"event_id"`
	EventTimestamp time.Time `json:"event_timestamp"`
	UserID         int64     `json:"user_id"`
	Case           string    `json:"case"`
	Note           string    `json:"note,omitempty"`
	Account        string    `json:"account,omitempty"` // a number beyond 64 bits, as text
	Balance        string    `json:"balance,omitempty"` // a decimal number, as text
	Photo          []byte    `json:"photo,omitempty"`   // in base64
	Tags           []string  `json:"tags,omitempty"`
}

func wrapped(event UserJoined) Envelope {
	event.EventID, event.EventTimestamp = newID(), time.Now() // with nanoseconds, and the offset of this machine
	return Envelope{"notification_event", "UserJoined", event.EventID, event, nil}
}

// Read is what the tests compare of a message that this program has read.
type Read struct {
	ID    string `json:"id"`
	Name  string `json:"name"`
	At    string `json:"at"`
	Photo []int  `json:"photo,omitempty"`
	UserJoined
}

func parse(body []byte) (*Read, error) {
	var event UserJoined
	envelope := Envelope{Payload: &event}
	if err := json.Unmarshal(body, &envelope); err != nil {
		return nil, err
	}
	read := Read{ID: envelope.MessageID, Name: envelope.MessageName, UserJoined: event}
	read.At = event.EventTimestamp.UTC().Format("2006-01-02T15:04:05.000Z")
	for _, each := range event.Photo {
		read.Photo = append(read.Photo, int(each))
	}
	return &read, nil
}
