"""The Lua scripts of Redis Streams: each happens in Redis as a whole, or not at all."""

# All times are by the clock of Redis: the clocks of two consumers may differ by more than a delay.
_NOW = b"""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""
# Do nothing to an entry that is not this consumer's: another has it, or it was settled and the reply was lost. ARGV:
# group, consumer. *leased* is "leased" if nobody can have claimed the entry. If the group does not know such an entry
# any more, and the stream has it no more, it was removed there (XCLAIM and XAUTOCLAIM then make the group forget it, as
# does the end of the group), and nobody else will have it. *remove* is the command that removes the entry from its
# stream, or an empty string.
_SETTLING = b"""
local function is_ours(id, leased)
  local held = redis.pcall('XPENDING', KEYS[1], ARGV[1], id, id, 1, ARGV[2])
  if held.err or #held == 0 then
    return leased ~= '' and #redis.call('XRANGE', KEYS[1], id, id) == 0
  end
  return true
end
local function settle(id, remove)
  redis.call('XACK', KEYS[1], ARGV[1], id)
  if remove ~= '' then
    redis.call(remove, KEYS[1], id)
  end
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
# Move an entry out of the group, to be retried. KEYS: stream, delayed, again. ARGV: group, consumer, id, leased,
# remove, the message as it is kept, after (ms).
RETRY = (
    _SETTLING
    + _NOW
    + b"""
if is_ours(ARGV[3], ARGV[4]) then
  if tonumber(ARGV[7]) > 0 then
    redis.call('ZADD', KEYS[2], now + ARGV[7], ARGV[6])
  else
    redis.call('XADD', KEYS[3], '*', 'again', ARGV[6])
  end
  settle(ARGV[3], ARGV[5])
end
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
# Dead-letter entries. KEYS: stream, dead. ARGV: group, consumer, then for each entry: id, leased, remove, "copy" to
# begin with the fields of the entry itself, so that they need not travel, how many (further) fields follow, and these.
# Return the ids of the entries that cannot be copied because they were removed.
DEAD_LETTER = (
    _SETTLING
    + b"""
local removed, at = {}, 3
while ARGV[at] do
  local id, last = ARGV[at], at + 4 + ARGV[at + 4]
  if is_ours(id, ARGV[at + 1]) then
    local fields = {}
    if ARGV[at + 3] ~= '' then
      local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
      fields = entry and entry[2]
    end
    if fields then
      for i = at + 5, last do
        fields[#fields + 1] = ARGV[i]
      end
      redis.call('XADD', KEYS[2], '*', unpack(fields))
      settle(id, ARGV[at + 2])
    else
      removed[#removed + 1] = id
    end
  end
  at = last + 1
end
return removed
"""
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
