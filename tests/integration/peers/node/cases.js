// What a Node.js program may send: the documented form, and odd things with it.
'use strict';

const { randomUUID } = require('node:crypto');
const { CompressionTypes } = require('kafkajs');
const { envelope } = require('./event');

const json = (value) => Buffer.from(JSON.stringify(value));
const plain = (name = 'plain', payload = {}) => json(envelope({ user_id: 1, case: name, ...payload }));
const id = randomUUID;

// Messages whose bodies functions make of their names.
const bodies = (makers) =>
  Object.fromEntries(Object.entries(makers).map(([name, make]) => [name, { body: make(name) }]));

// An envelope with other keys, a payload with other fields, and a body with another text for the user.
const enveloped = (changes) => (name) => json({ ...envelope({ user_id: 1, case: name }), ...changes });
const field = (changes) => (name) => plain(name, changes);
const user = (text) => (name) => Buffer.from(String(plain(name)).replace('"user_id":1', `"user_id":${text}`));
const without = (key) => (name) => {
  const message = { ...envelope({ user_id: 1, case: name }), message_id: '9f62e977-8a1c-4b7e-a0d5-6c1f2f3b9e11' };
  delete message.payload[key];
  return json(message);
};

const cases = {
  documented: () => ({
    plain: { body: plain() },
    key: { body: plain('key'), key: 'Schlüssel' },
    headers: { body: plain('headers'), key: '7', headers: { tenant: '7', traceparent: '00-ab-cd-01' } },
  }),

  // The same, where the service has no headers: they stand in the body.
  'documented-pubsub': () => ({
    plain: { body: plain() },
    key: { body: json({ ...envelope({ user_id: 1, case: 'key' }), headers: { key: 'Schlüssel' } }) },
    headers: {
      body: json({
        ...envelope({ user_id: 1, case: 'headers' }),
        headers: { key: '7', tenant: '7', traceparent: '00-ab-cd-01' },
      }),
    },
  }),

  pubsub: () => ({
    'null-headers': { body: enveloped({ headers: null })('null-headers') },
    bytes: { body: Buffer.from([0, 255]) },
    'number-header': { body: enveloped({ headers: { retry: 1 } })('number-header') },
    last: { body: plain('last') },
  }),

  bodies: () =>
    bodies({
      pretty: (name) => Buffer.from(JSON.stringify(envelope({ user_id: 1, case: name }), null, 2)),
      'other-order': (name) => json(Object.fromEntries(Object.entries(envelope({ case: name, user_id: 1 })).reverse())),
      'further-keys': enveloped({ specversion: '1.0', tenant: null }),
      'further-fields': field({ unknown: { a: 1 } }),
      'escaped-text': (name) => Buffer.from(String(plain(name)).replace('"escaped-text"', '"escaped\\u002dtext"')),
      'null-headers': enveloped({ headers: null }),
      'text-headers': enveloped({ headers: { tenant: '7' } }),
      'number-headers': enveloped({ headers: { retry: 1 } }),
      'object-headers': enveloped({ headers: { retry: {} } }),
      'null-key': enveloped({ key: null }),
      'upper-case-id': enveloped({ message_id: id().toUpperCase() }),
      'id-without-dashes': enveloped({ message_id: id().replaceAll('-', '') }),
      'urn-id': enveloped({ message_id: `urn:uuid:${id()}` }),
      'braced-id': enveloped({ message_id: `{${id()}}` }),
      ulid: enveloped({ message_id: '01ARZ3NDEKTSV4RRFFQ69G5FAV' }),
      'number-id': enveloped({ message_id: 5 }),
      'null-type': enveloped({ message_type: null }),
      'other-name': enveloped({ message_name: 'UserLeft' }),
      'camel-case': (name) => json({ messageName: 'UserJoined', messageId: id(), payload: { case: name } }),
      'text-payload': enveloped({ payload: '{"user_id":1}' }),
      list: (name) => json([envelope({ user_id: 1, case: name })]),
      'no-event-id': without('event_id'),
      'no-event-timestamp': without('event_timestamp'),
      'number-as-text': user('"1"'),
      'whole-number-as-float': user('1.0'),
      fraction: user('1.5'),
      'boolean-as-number': user('true'),
      'beyond-53-bits': user('9007199254740993'),
      'beyond-64-bits': user('18446744073709551617'),
      'long-number': user('9'.repeat(200)),
      'large-number-as-text': field({ account: String(2n ** 63n) }),
      'decimal-as-text': field({ balance: '12.30' }),
      'decimal-as-number': field({ balance: 12.3 }),
      'not-a-number': user('NaN'),
      milliseconds: field({ joined_at: '2026-01-02T03:04:05.678Z' }),
      microseconds: field({ joined_at: '2026-01-02T03:04:05.678901Z' }),
      nanoseconds: field({ joined_at: '2026-01-02T03:04:05.678901234Z' }),
      offset: field({ joined_at: '2026-01-02T03:04:05+02:00' }),
      'date-only': field({ joined_at: '2026-01-02' }),
      epoch: field({ joined_at: 1767323045678 }),
      'zone-name': field({ joined_at: '2026-01-02T03:04:05+01:00[Europe/Paris]' }),
      'year-10000': field({ joined_at: new Date(Date.UTC(10000, 0)) }),
      base64: field({ photo: Buffer.from([0, 255]).toString('base64') }),
      'base64-url': field({ photo: Buffer.from([0, 255, 255]).toString('base64url') }),
      buffer: field({ photo: Buffer.from([0, 255]) }),
      'lone-surrogate': field({ note: '\ud800' }),
      'byte-order-mark': (name) => Buffer.from(`\ufeff${plain(name)}`),
      'utf-16': (name) => Buffer.from(String(plain(name)), 'utf16le'),
      'latin-1': (name) => Buffer.from(String(plain(name, { note: 'grün' })), 'latin1'),
      'line-feed': (name) => Buffer.from(`${plain(name)}\n`),
      empty: () => Buffer.alloc(0),
      null: () => json(null),
      last: plain,
    }),

  streams: () => ({
    'no-body': { odd: ['data', plain('no-body')] },
    'two-bodies': { odd: ['body', plain('two-bodies'), 'body', 'x'] },
    'binary-field': { odd: ['body', plain('binary-field'), Buffer.from([255, 0]), Buffer.from([254])] },
    'number-field': { odd: ['retry', 5, 'body', plain('number-field')] },
    last: { body: plain('last') },
  }),

  rabbitmq: () => {
    const timestamp = (value) => ({ '!': 'timestamp', value });
    const typed = {
      flag: true, nothing: null, bytes: Buffer.from([0, 255]), list: [1, 'x', { y: 1 }], table: { a: { b: 1 } },
      at: timestamp(1796016343), decimal: { '!': 'decimal', value: { digits: 12345, places: 2 } }, fraction: 0.1,
    };
    const odd = {
      transient: { persistent: false },
      properties: {
        contentType: 'application/json; charset=utf-8', contentEncoding: 'utf-8', priority: 5, expiration: '60000',
        correlationId: 'Ü', replyTo: 'q', messageId: 'not-a-uuid', type: 'user.joined', appId: 'node',
      },
      seconds: { timestamp: Math.floor(Date.now() / 1000) },
      milliseconds: { timestamp: Date.now() },
      microseconds: { timestamp: Date.now() * 1000 },
      'text-header': { headers: { tenant: 'seven' } },
      'number-headers': { headers: { whole: 5, negative: -1, large: 2 ** 53, fraction: 0.1, real: 1234567.891 } },
      'typed-headers': { headers: typed },
      'garbage-with-headers': { body: Buffer.from('not json'), headers: typed },
      'number-key': { headers: { key: 42 } },
      'huge-double': { headers: { size: 1e300 } },
      'milliseconds-header': { headers: { at: timestamp(Date.now()) } },
      'microseconds-header': { headers: { at: timestamp(Date.now() * 1000) } },
      'long-header': { headers: { text: 'x'.repeat(60_000) } },
      copies: { CC: 'somebody-else' },
      attempts: { headers: { 'diator-attempt': 7, 'x-delivery-count': 99 } },
      last: {},
    };
    return Object.fromEntries(Object.entries(odd).map(([name, more]) => [name, { body: plain(name), ...more }]));
  },

  kafka: () => ({
    gzip: { body: plain('gzip'), compression: CompressionTypes.GZIP },
    'null-value': { body: null, key: 'k' },
    'empty-value': { body: Buffer.alloc(0), key: 'k' },
    'empty-key': { body: plain('empty-key'), key: '' },
    'binary-key': { body: plain('binary-key'), key: Buffer.from([255, 254, 0]) },
    'unicode-headers': { body: plain('unicode-headers'), headers: { ümlaut: 'grün😀', empty: '' } },
    'binary-header': { body: plain('binary-header'), headers: { digest: Buffer.from([255, 0, 1]) } },
    'repeated-header': { body: plain('repeated-header'), headers: { tenant: ['1', '2'] } },
    'key-header': { body: plain('key-header'), key: 'k', headers: { key: 'another' } },
    'year-1970': { body: plain('year-1970'), timestamp: '1' },
    'large-gzip': { body: plain('large-gzip', { note: 'z'.repeat(900_000) }), compression: CompressionTypes.GZIP },
    last: { body: plain('last') },
  }),

  // One message for each key.
  keys: (keys) => Object.fromEntries(keys.map((key) => [key, { body: plain('keys'), key }])),
};

module.exports = { cases };
