// The event of the tests, as a Node.js program writes and reads it.
'use strict';

const { randomUUID } = require('node:crypto');

function envelope(payload) {
  const id = randomUUID();
  return {
    message_type: 'notification_event',
    message_name: 'UserJoined',
    message_id: id,
    payload: { event_id: id, event_timestamp: new Date(), ...payload },
  };
}

function parse(body) {
  const message = JSON.parse(body);
  const { event_timestamp: at, photo, account, ...fields } = message.payload;
  return {
    id: message.message_id,
    name: message.message_name,
    at: new Date(at).toISOString(),
    photo: photo && [...Buffer.from(photo, 'base64')],
    account: account && String(BigInt(account)), // a text: JSON.parse would round a number beyond 2 ** 53
    ...fields,
  };
}

module.exports = { envelope, parse };
