"""
Redis Streams. Needs the extra `redis`.

One stream for each topic, `<prefix>:<message_type>:<message_name>`, which all groups share. Beside it each group has
keys of its own: `…:<group>:delayed` holds messages that wait for a delayed retry, by the time when they are due;
`…:<group>:again` holds the messages that are due, a stream that the group reads like the first; `…:<group>:dead` holds
dead-lettered messages.
"""

from diator.brokers.redis._streams import RedisStreamMessageBroker

__all__ = ["RedisStreamMessageBroker"]
