"""The Lua scripts of Redis Streams: each happens in Redis as a whole, or not at all."""

# All times are by the clock of Redis: the clocks of two consumers may differ by more than a delay.
_NOW = b"""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""
# Do nothing to an entry that is not this consumer's: another has it, or it was settled and the reply was lost. ARGV:
# group, consumer, id, "leased" if nobody can have claimed the entry. If the group does not know such an entry any more,
# and the stream has it no more, it was removed there (XCLAIM and XAUTOCLAIM then make the group forget it, as does the
# end of the group), and nobody else will have it.
_IF_OURS = b"""
local held = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2])
if held.err or #held == 0 then
  if ARGV[4] == '' or #redis.call('XRANGE', KEYS[1], ARGV[3], ARGV[3]) > 0 then
    return 0
  end
end
"""
# The end of such a script. ARGV[5]: the command that removes the entry from its stream, or an empty string.
_DONE = b"""
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
if ARGV[5] ~= '' then
  redis.call(ARGV[5], KEYS[1], ARGV[3])
end
return 1
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
# Move an entry out of the group, to be retried. KEYS: stream, delayed, again. ARGV: as above, then the message as it is
# kept, after (ms).
RETRY = (
    _IF_OURS
    + _NOW
    + b"""
if tonumber(ARGV[7]) > 0 then
  redis.call('ZADD', KEYS[2], now + ARGV[7], ARGV[6])
else
  redis.call('XADD', KEYS[3], '*', 'again', ARGV[6])
end
"""
    + _DONE
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
# Dead-letter an entry. KEYS: stream, dead. ARGV: as above, then "copy" to begin with the fields of the entry itself, so
# that they need not travel, and the (further) fields. Return -1 if the entry cannot be copied because it was removed.
DEAD_LETTER = (
    _IF_OURS
    + b"""
local fields = {}
if ARGV[6] ~= '' then
  local entry = redis.call('XRANGE', KEYS[1], ARGV[3], ARGV[3])[1]
  if not entry then
    return -1
  end
  fields = entry[2]
end
for i = 7, #ARGV do
  fields[#fields + 1] = ARGV[i]
end
redis.call('XADD', KEYS[2], '*', unpack(fields))
"""
    + _DONE
)
# Renew the leases of entries. KEYS: stream. ARGV: group, consumer, ids. Return those that are this consumer's, and
# those that were removed from the stream.
RENEW = b"""
local claim, removed = {'XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0}, {}
for i = 3, #ARGV do
  if #redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i]) == 0 then
    removed[#removed + 1] = ARGV[i]
  elseif #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2]) > 0 then
    claim[#claim + 1] = ARGV[i]
  end
end
if #claim == 5 then
  return {{}, removed}
end
claim[#claim + 1] = 'JUSTID'
return {redis.call(unpack(claim)), removed}
"""
# Look for a key that a group cannot use. KEYS: the stream that all groups share, then the keys of this group. ARGV: for
# each key, whether it is a "zset" or a "stream". Return the first wrong one, and what is wrong with it.
CHECK = b"""
for i, key in ipairs(KEYS) do
  local found
  if ARGV[i] == 'zset' then
    found = redis.pcall('ZRANGEBYSCORE', key, 0, 0, 'LIMIT', 0, 0)
  else
    found = redis.pcall('XINFO', 'STREAM', key)
  end
  if found.err and string.find(found.err, 'WRONGTYPE', 1, true) then
    return {key, 'is not a ' .. ARGV[i]}
  elseif found.err and not string.find(found.err, 'no such key', 1, true) then
    return found
  end
  for j = 1, i > 1 and #found - 1 or 0 do  -- nothing needs to be added to the first
    if found[j] == 'last-generated-id' and found[j + 1] == '18446744073709551615-18446744073709551615' then
      return {key, 'has the last possible id, so nothing can be added'}
    end
  end
end
"""
# Delete idle consumers that hold nothing. KEYS: stream. ARGV: group, idle (ms), the consumer that leaves now.
FORGET = b"""
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local name, pending, idle = consumer[2], consumer[4], consumer[6]
  if pending == 0 and (name == ARGV[3] or idle > tonumber(ARGV[2])) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], name)
  end
end
"""
