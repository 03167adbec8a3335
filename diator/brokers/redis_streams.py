"""
Redis Streams. Needs the extra `redis`.

Each topic has one stream, `<prefix>:<message_type>:<message_name>`, which all groups share. Each group also has keys of
its own. The sorted set `…:<group>:delayed` contains the messages that wait for a delayed retry. The stream
`…:<group>:again` contains the messages that are due, and the group reads it as it reads the first stream. The stream
`…:<group>:dead` contains dead-lettered messages.
"""

from diator.brokers.redis._streams import RedisStreamMessageBroker

__all__ = ["RedisStreamMessageBroker"]
