// Redis Pub/Sub and Redis Streams, with ioredis.
'use strict';

const Redis = require('ioredis');
const { Received, texts } = require('./received');

const pubsub = {
  async listen(url, channel) {
    const redis = new Redis(url);
    const received = new Received();
    redis.on('messageBuffer', (_, body) => received.push({ body }));
    await redis.subscribe(channel);
    return received;
  },

  async sender(url, channel) {
    const redis = new Redis(url);
    return (message) => redis.publish(channel, message.body);
  },
};

const streams = {
  async listen(url, stream) {
    const redis = new Redis(url);
    const received = new Received();
    const group = 'node';
    await redis.xgroup('CREATE', stream, group, '0', 'MKSTREAM');
    const read = async () => {
      for (;;) {
        const [[, entries]] =
          (await redis.xreadgroupBuffer('GROUP', group, 'me', 'BLOCK', 1000, 'STREAMS', stream, '>')) ?? [[stream, []]];
        for (const [id, fields] of entries) {
          const entry = {};
          for (let i = 0; i < fields.length; i += 2) entry[fields[i]] = fields[i + 1];
          const { body, key, ...headers } = entry;
          received.push({ body, key: key?.toString(), headers: texts(headers) });
          await redis.xack(stream, group, id);
        }
      }
    };
    read();
    return received;
  },

  async sender(url, stream) {
    const redis = new Redis(url);
    return async ({ body, key, headers = {}, odd }) => {
      if (odd) return redis.xadd(stream, '*', ...odd);
      const fields = ['body', body, ...Object.entries(headers).flat()];
      if (key !== undefined) fields.push('key', key);
      return redis.xadd(stream, '*', ...fields);
    };
  },
};

module.exports = { pubsub, streams };
