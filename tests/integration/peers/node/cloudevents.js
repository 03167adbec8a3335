// CloudEvents, with the official SDK.
'use strict';

const { CloudEvent, HTTP, Kafka } = require('cloudevents');

// An attribute is a header `ce_…` as on Kafka, or `ce-…` as in HTTP.
const isLikeKafka = (transport) => ['kafka', 'streams'].includes(transport);

function read(transport, { body, key, headers = {}, properties = {} }) {
  // This binding takes the key of the record for the attribute `partitionkey`, and only Kafka has such a key.
  if (transport === 'kafka') return Kafka.toEvent({ headers, value: body, key });
  if (headers.ce_id) return Kafka.toEvent({ headers, value: body, key: headers.ce_partitionkey });
  const contentType = properties.contentType ?? 'application/cloudevents+json'; // Redis Pub/Sub has no place for it
  return HTTP.toEvent({ headers: { ...headers, 'content-type': contentType }, body: String(body) });
}

function written(transport, mode, attributes) {
  const event = new CloudEvent(attributes);
  const { headers: all, ...message } = (isLikeKafka(transport) ? Kafka : HTTP)[mode](event);
  const headers = Object.fromEntries(Object.entries(all).filter(([, value]) => value !== undefined));
  const value = isLikeKafka(transport) ? message.value : message.body;
  const body = Buffer.from(typeof value === 'string' ? value : JSON.stringify(value));
  if (isLikeKafka(transport)) return { body, key: message.key, headers };
  const { 'content-type': contentType, ...attributesAsHeaders } = headers;
  return { body, contentType, headers: attributesAsHeaders };
}

module.exports = { read, written };
