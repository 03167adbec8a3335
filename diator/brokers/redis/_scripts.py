"""The Lua scripts of Redis Streams: each happens in Redis as a whole, or not at all."""

# All times are by the clock of Redis: the clocks of two consumers may differ by more than a delay.
_NOW = b"""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""
# Do nothing to an entry that is not this consumer's: another has it, or it was settled and the reply was lost.
_IF_OURS = b"""
if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2]) == 0 then
  return 0
end
"""
# Acknowledge entries. KEYS: stream. ARGV: group, consumer, the command that removes them or an empty string, ids.
ACK = b"""
local ours = {}
for i = 4, #ARGV do
  if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2]) > 0 then
    ours[#ours + 1] = ARGV[i]
  end
end
if #ours > 0 then
  redis.call('XACK', KEYS[1], ARGV[1], unpack(ours))
  if ARGV[3] ~= '' then
    redis.call(ARGV[3], KEYS[1], unpack(ours))
  end
end
"""
# Move an entry out of the group, to be retried. KEYS: stream, delayed, again. ARGV: group, consumer, id, the message
# as it is kept, after (ms).
RETRY = (
    _IF_OURS
    + _NOW
    + b"""
if tonumber(ARGV[5]) > 0 then
  redis.call('ZADD', KEYS[2], now + ARGV[5], ARGV[4])
else
  redis.call('XADD', KEYS[3], '*', 'again', ARGV[4])
end
return redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
"""
)
# Move the messages that are due from the sorted set to the stream. KEYS: delayed, again. ARGV: how many at most.
MOVE_DUE = (
    _NOW
    + b"""
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])
for _, kept in ipairs(due) do
  redis.call('XADD', KEYS[2], '*', 'again', kept)
  redis.call('ZREM', KEYS[1], kept)
end
return #due
"""
)
# Dead-letter an entry. KEYS: stream, dead. ARGV: group, consumer, id, then the fields.
DEAD_LETTER = (
    _IF_OURS
    + b"""
redis.call('XADD', KEYS[2], '*', unpack(ARGV, 4))
return redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
"""
)
# Delete idle consumers that hold nothing. KEYS: stream. ARGV: group, idle (ms), the consumer that leaves now.
FORGET = b"""
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local name, pending, idle = consumer[2], consumer[4], consumer[6]
  if pending == 0 and (name == ARGV[3] or idle > tonumber(ARGV[2])) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], name)
  end
end
"""
