// Reads commands from its standard input, one JSON object a line, and answers each with a line.
'use strict';

const { createInterface } = require('node:readline');
const { parse } = require('./event');
const { cases } = require('./cases');
const cloudEvents = require('./cloudevents');

const transports = { ...require('./redis'), rabbitmq: require('./rabbitmq'), kafka: require('./kafka') };
const listening = {};

const commands = {
  // Begin to receive.
  async listen({ transport, address, name }) {
    listening[name] = await transports[transport].listen(address, name);
    return {};
  },

  // Return the next message. With `raw`, its body may be anything.
  async read({ name, raw }) {
    const { body, ...beside } = await listening[name].next();
    return { ...beside, body: body?.toString('base64') ?? null, event: raw ? null : parse(body) };
  },

  // Return the next message as the SDK of CloudEvents reads it.
  async readEvent({ transport, name }) {
    return { event: cloudEvents.read(transport, await listening[name].next()) };
  },

  // Send a message that the SDK of CloudEvents writes.
  async sendEvent({ transport, address, name, mode, event }) {
    const send = await transports[transport].sender(address, name);
    await send(cloudEvents.written(transport, mode, event));
    return {};
  },

  // Send the next message again, to another place.
  async move({ transport, address, name, to }) {
    const send = await transports[transport].sender(address, to);
    const { body, key, headers } = await listening[name].next();
    await send({ body, key, headers });
    return {};
  },

  // Send a list of messages, one after the other. Return their names, bodies and headers.
  async send({ transport, address, name, which, keys }) {
    const send = await transports[transport].sender(address, name);
    const sent = [];
    for (const [title, message] of Object.entries(cases[which](keys))) {
      await send(message);
      sent.push([title, message.body?.toString('base64') ?? null, message.headers ?? {}]);
    }
    return { sent };
  },
};

async function main() {
  for await (const line of createInterface({ input: process.stdin })) {
    const { do: what, ...options } = JSON.parse(line);
    process.stdout.write(`${JSON.stringify(await commands[what](options))}\n`);
  }
  process.exit();
}

main();
