// Kafka, with kafkajs.
'use strict';

const { randomUUID } = require('node:crypto');
const { Kafka, Partitioners, logLevel } = require('kafkajs');
const { Received, texts } = require('./received');

const client = (servers) => new Kafka({ brokers: servers.split(','), logLevel: logLevel.ERROR });

async function listen(servers, topic) {
  const consumer = client(servers).consumer({ groupId: `node-${randomUUID()}` });
  const received = new Received();
  await consumer.connect();
  await consumer.subscribe({ topic, fromBeginning: true });
  await consumer.run({
    eachMessage: async ({ partition, message }) => {
      const headers = texts(message.headers);
      received.push({ body: message.value, key: message.key?.toString(), headers, partition });
    },
  });
  return received;
}

async function sender(servers, topic) {
  // Its default partitioner is that of Java, murmur2, as diator's.
  const producer = client(servers).producer({ createPartitioner: Partitioners.DefaultPartitioner });
  await producer.connect();
  return async ({ body, key, headers, compression, timestamp }) => {
    await producer.send({ topic, compression, messages: [{ key, value: body, headers, timestamp }] });
  };
}

module.exports = { listen, sender };
