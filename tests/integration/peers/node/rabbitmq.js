// RabbitMQ, with amqplib.
'use strict';

const amqp = require('amqplib');
const { Received } = require('./received');

// NAME is a queue, or `exchange/routing key` for a queue of our own.
async function listen(url, name) {
  const channel = await (await amqp.connect(url)).createChannel();
  const received = new Received();
  let [queue, routingKey] = name.split('/');
  if (routingKey) {
    const exchange = queue;
    await channel.assertExchange(exchange, 'topic', { durable: true, alternateExchange: `${exchange}:retained` });
    ({ queue } = await channel.assertQueue('', { exclusive: true }));
    await channel.bindQueue(queue, exchange, routingKey);
  }
  await channel.consume(queue, (message) => {
    const { contentType, messageId, type } = message.properties;
    const { key, ...headers } = message.properties.headers ?? {};
    received.push({ body: message.content, key, headers, properties: { contentType, messageId, type } });
    channel.ack(message);
  });
  return received;
}

async function sender(url, name) {
  const [exchange, routingKey] = name.split('/');
  const channel = await (await amqp.connect(url)).createConfirmChannel();
  return async ({ body, key, headers, ...properties }) => {
    if (key !== undefined) headers = { ...headers, key };
    channel.publish(exchange, routingKey, body, { persistent: true, ...properties, headers });
    await channel.waitForConfirms();
  };
}

module.exports = { listen, sender };
