// A queue between a client library that calls a function and a program that waits for the next message.
'use strict';

class Received {
  #messages = [];
  #waiting = [];

  push(message) {
    const waiting = this.#waiting.shift();
    if (waiting) waiting(message);
    else this.#messages.push(message);
  }

  next() {
    if (this.#messages.length) return this.#messages.shift();
    return new Promise((resolve) => this.#waiting.push(resolve));
  }
}

// Header values are bytes on Kafka and Redis. Kafka may have several of one name, and the last one counts.
const last = (value) => (Array.isArray(value) ? value.at(-1) : value);
const texts = (headers) =>
  Object.fromEntries(Object.entries(headers).map(([name, value]) => [name, String(last(value))]));

module.exports = { Received, texts };
