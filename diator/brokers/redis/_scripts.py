"""What has to happen in Redis as a whole, or not at all: the scripts of Redis Streams."""

# All times are those of Redis: the clocks of two members may differ by more than a delay.
_NOW = b"""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""
# Do nothing to an entry that is not this member's: another has it, or it was settled and the reply was lost.
_IF_OURS = b"""
if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2]) == 0 then
  return 0
end
"""
# Acknowledge entries. KEYS: stream. ARGV: group, member, command that removes them or none, ids.
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
# Take an entry from the group, to be read again.
# KEYS: stream, delayed, again. ARGV: group, member, id, kept, after (ms).
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
# Have what is due read again. KEYS: delayed, again. ARGV: how many at most.
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
# Put an entry aside. KEYS: stream, dead. ARGV: group, member, id, then the fields.
DEAD_LETTER = (
    _IF_OURS
    + b"""
redis.call('XADD', KEYS[2], '*', unpack(ARGV, 4))
return redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
"""
)
# Forget members that are gone and hold nothing. KEYS: stream. ARGV: group, idle (ms), name of one that goes now.
FORGET = b"""
for _, member in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local name, pending, idle = member[2], member[4], member[6]
  if pending == 0 and (name == ARGV[3] or idle > tonumber(ARGV[2])) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], name)
  end
end
"""
