"""The Lua scripts that change more than one thing at once. Every one of them may be run twice with
the effect of once.

They use commands of Redis 6.2 alone. Where one must work on a Redis that is out of memory, its
first write is a command that frees memory (XACK, DEL): Redis refuses a script at its first write
that needs memory, never in its middle.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Script:
    """Lua source, and the digest that EVALSHA calls it by."""

    source: str

    @cached_property
    def sha(self) -> str:
        """The SHA-1 that Redis knows the script by."""
        return hashlib.sha1(self.source.encode()).hexdigest()


# The hop. KEYS: source, then the targets. ARGV: group, then per record: id, outs, and per out:
# target's index in KEYS, number of strings, field, value, … Returns 1 for each record it moved, 0
# for each that somebody else had moved. XACK is the fence: it returns 1 to the first finisher
# alone, whoever holds the record by then.
HOP = Script("""
local moved, at = {}, 2
while at <= #ARGV do
  local id, outs = ARGV[at], tonumber(ARGV[at + 1])
  at = at + 2
  local mine = redis.call('XACK', KEYS[1], ARGV[1], id) == 1
  if mine then redis.call('XDEL', KEYS[1], id) end
  for _ = 1, outs do
    local target, strings = KEYS[tonumber(ARGV[at])], tonumber(ARGV[at + 1])
    if mine then redis.call('XADD', target, '*', unpack(ARGV, at + 2, at + 1 + strings)) end
    at = at + 2 + strings
  end
  moved[#moved + 1] = mine and 1 or 0
end
return moved
""")

# KEYS: stream. ARGV: group, me, ids. Sets the idle time of the entries that are still mine to 0,
# keeping their count.
RENEW = Script("""
local renewed = 0
for i = 3, #ARGV do
  local id = ARGV[i]
  if #redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1, ARGV[2]) == 1 then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'JUSTID')
    renewed = renewed + 1
  end
end
return renewed
""")

# KEYS: stream. ARGV: group, me, parking consumer, ids. Parks the entries that are still mine as
# idle for a day, and takes back the delivery that they were counted: the next reaper's pass hands
# them on.
GIVE_BACK = Script("""
local parked = 0
for i = 4, #ARGV do
  local id = ARGV[i]
  local row = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1, ARGV[2])[1]
  if row then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, id, 'IDLE', 86400000, 'RETRYCOUNT', math.max(row[4] - 1, 0), 'JUSTID')
    parked = parked + 1
  end
end
return parked
""")

# KEYS: stream, workers. ARGV: group, me. Deletes my consumer unless entries are pending with it
# (Redis would forget them).
RETIRE = Script("""
redis.call('HDEL', KEYS[2], ARGV[2])
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) == 0 then
  redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
  return 1
end
return 0
""")

# KEYS: stream, workers. ARGV: group, idle ms. Deletes consumers without pending entries that were
# not heard of for so long.
BURY = Script("""
local buried = 0
if redis.call('EXISTS', KEYS[1]) == 0 then return redis.error_reply('NOGROUP the stream is gone') end
for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local consumer = {}
  for i = 1, #flat, 2 do consumer[flat[i]] = flat[i + 1] end
  if consumer.pending == 0 and consumer.idle > tonumber(ARGV[2]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer.name)
    redis.call('HDEL', KEYS[2], consumer.name)
    buried = buried + 1
  end
end
return buried
""")

# KEYS: workers, ready. ARGV: me, state, the stage that I have been ready for, or ''. The leading
# HDEL lets heartbeats go on when Redis is out of memory; that readiness is said again with each
# brings it back when Redis has lost it.
HEARTBEAT = Script("""
redis.call('HDEL', KEYS[1], ARGV[1])
local now = redis.call('TIME')
redis.call('HSET', KEYS[1], ARGV[1], now[1] .. '.' .. string.format('%06d', now[2]) .. ' ' .. ARGV[2])
if ARGV[3] ~= '' then redis.call('SADD', KEYS[2], ARGV[3]) end
return 1
""")

# KEYS: ready. ARGV: stage. The leading SREM is for a Redis that is out of memory.
MARK_READY = Script("""
redis.call('SREM', KEYS[1], ARGV[1])
return redis.call('SADD', KEYS[1], ARGV[1])
""")

# KEYS: stream. ARGV: first id, count. Returns the last id and the numbers, without moving the
# payloads to the client.
NUMBERS = Script("""
local numbers, last = {}, ''
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])) do
  last = entry[1]
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 'n' then numbers[#numbers + 1] = entry[2][i + 1] end
  end
end
return {last, numbers}
""")

# KEYS: epoch, lease. ARGV: me, ttl ms, the highest epoch known elsewhere, a holder known to be
# dead. Returns the new epoch, above that one and all before, or 0 and the holder.
ACQUIRE = Script("""
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[1] and holder ~= ARGV[4] then return {0, holder} end
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
local epoch = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), tonumber(ARGV[3])) + 1
redis.call('SET', KEYS[1], string.format('%.0f', epoch))
return {epoch, ARGV[1]}
""")

_FENCE = """
local epoch = redis.call('GET', KEYS[1])
if tonumber(epoch or 0) < tonumber(ARGV[1]) then return redis.error_reply('DATALOST epoch ' .. ARGV[1] .. ' is not known') end
if epoch ~= ARGV[1] then return redis.error_reply('LEASELOST epoch ' .. ARGV[1] .. ' was followed by ' .. tostring(epoch)) end
"""


def _fenced(source: str) -> Script:
    """A script that only the trainer may run: KEYS[1] is the epoch's key and ARGV[1] the caller's
    epoch.
    """
    return Script(_FENCE + source)


# KEYS: epoch, lease. ARGV: epoch, me, ttl ms. An expired lease that nobody took since is mine
# still.
RENEW_LEASE = _fenced("""
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
return 1
""")

# KEYS: epoch, lease. ARGV: epoch, me.
RELEASE_LEASE = _fenced("""
if redis.call('GET', KEYS[2]) == ARGV[2] then return redis.call('DEL', KEYS[2]) end
return 0
""")

# KEYS: epoch, issued, tickets, gated streams. ARGV: epoch, expected count, max backlog, then
# number, payload, … Returns 1 when the tickets stand issued (now, or by the first run of a repeated
# call), 0 when the backlog forbids it.
ISSUE = _fenced("""
local issued, expected, count = tonumber(redis.call('GET', KEYS[2]) or 0), tonumber(ARGV[2]), (#ARGV - 3) / 2
if issued >= expected + count then return 1 end
if issued < expected then return redis.error_reply('DATALOST ' .. issued .. ' tickets are known, not ' .. expected) end
if issued ~= expected then return redis.error_reply('MISCOUNT ' .. issued .. ' tickets were issued, not ' .. expected) end
for i = 4, #KEYS do
  if redis.call('XLEN', KEYS[i]) > tonumber(ARGV[3]) then return 0 end
end
redis.call('INCRBY', KEYS[2], count)
for i = 4, #ARGV, 2 do redis.call('XADD', KEYS[3], '*', 'n', ARGV[i], 'b', ARGV[i + 1]) end
return 1
""")

# KEYS: epoch, issued, tickets, requests, requeued, gated streams. ARGV: epoch, expected count, max
# backlog, requests, then per request its id, the new number and the dead one, then number, payload,
# … ISSUE, and the requests are served, all or none.
ISSUE_REQUEUED = _fenced("""
local first = 5 + 3 * tonumber(ARGV[4])
local issued, expected, count = tonumber(redis.call('GET', KEYS[2]) or 0), tonumber(ARGV[2]), (#ARGV - first + 1) / 2
if issued >= expected + count then return 1 end
if issued < expected then return redis.error_reply('DATALOST ' .. issued .. ' tickets are known, not ' .. expected) end
if issued ~= expected then return redis.error_reply('MISCOUNT ' .. issued .. ' tickets were issued, not ' .. expected) end
for i = 6, #KEYS do
  if redis.call('XLEN', KEYS[i]) > tonumber(ARGV[3]) then return 0 end
end
redis.call('INCRBY', KEYS[2], count)
for i = 5, first - 1, 3 do
  redis.call('XDEL', KEYS[4], ARGV[i])
  redis.call('HSET', KEYS[5], ARGV[i + 1], ARGV[i + 2])
end
for i = first, #ARGV, 2 do redis.call('XADD', KEYS[3], '*', 'n', ARGV[i], 'b', ARGV[i + 1]) end
return 1
""")

# KEYS: epoch, requests, dead. ARGV: epoch, then per request its id and that of the dead letter to
# delete, '' for none.
CLOSE_REQUESTS = _fenced("""
for i = 2, #ARGV, 2 do
  redis.call('XDEL', KEYS[2], ARGV[i])
  if ARGV[i + 1] ~= '' then redis.call('XDEL', KEYS[3], ARGV[i + 1]) end
end
return 1
""")

# KEYS: epoch, hash. ARGV: epoch, field, value, …
FILL_HASH = _fenced("""
redis.call('HDEL', KEYS[2], ARGV[2])
redis.call('HSET', KEYS[2], unpack(ARGV, 2))
return 1
""")

# KEYS: epoch, reissued, tickets. ARGV: epoch, token, then number, payload, …
REISSUE = _fenced("""
if redis.call('SADD', KEYS[2], ARGV[2]) == 1 then
  for i = 3, #ARGV, 2 do redis.call('XADD', KEYS[3], '*', 'n', ARGV[i], 'b', ARGV[i + 1]) end
end
return 1
""")

# KEYS: epoch, issued. ARGV: epoch, count.
RAISE_ISSUED = _fenced("""
if tonumber(redis.call('GET', KEYS[2]) or 0) < tonumber(ARGV[2]) then
  redis.call('DEL', KEYS[2])
  redis.call('SET', KEYS[2], ARGV[2])
end
return tonumber(redis.call('GET', KEYS[2]) or 0)
""")

# KEYS: epoch, policy, policies. ARGV: epoch, payload, announcements kept.
ANNOUNCE = _fenced("""
if redis.call('GET', KEYS[2]) == ARGV[2] then return 0 end
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[2], ARGV[2])
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[3], '*', 'b', ARGV[2])
return 1
""")

# KEYS: epoch, places, chunks. ARGV: epoch, place, index, chunk. The place is noted first: what is
# never finished can be found.
KEEP_CHUNK = _fenced("""
redis.call('SADD', KEYS[2], ARGV[2])
redis.call('HSET', KEYS[3], ARGV[3], ARGV[4])
return 1
""")

# KEYS: epoch, weights, places, chunks of what goes. ARGV: epoch, how many go, their places, then
# place and part of each that stays.
OFFER_WEIGHTS = _fenced("""
redis.call('DEL', KEYS[2])
for i = 4, #KEYS do redis.call('UNLINK', KEYS[i]) end
local gone = tonumber(ARGV[2])
for i = 3, 2 + gone do redis.call('SREM', KEYS[3], ARGV[i]) end
for i = 3 + gone, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
return 1
""")

_RELEASE = """
local function release(held, counts, images, number)
  local digests = redis.call('HGET', held, number)
  if not digests then return end
  redis.call('HDEL', held, number)
  for digest in string.gmatch(digests, '%S+') do
    if redis.call('HINCRBY', counts, digest, -1) <= 0 then
      redis.call('HDEL', counts, digest)
      redis.call('HDEL', images, digest)
    end
  end
end
"""

# KEYS: epoch, stream, held, counts, images. ARGV: epoch, group, then each id and its number. Images
# are let go with what needs them.
ACKNOWLEDGE = _fenced(
    _RELEASE
    + """
local done, holds = 0, redis.call('EXISTS', KEYS[3]) == 1
for i = 3, #ARGV, 2 do
  redis.call('XACK', KEYS[2], ARGV[2], ARGV[i])
  if redis.call('XDEL', KEYS[2], ARGV[i]) == 1 then
    done = done + 1
    if holds then release(KEYS[3], KEYS[4], KEYS[5], ARGV[i + 1]) end
  end
end
return done
"""
)

# KEYS: epoch, held, counts, images. ARGV: epoch, numbers.
RELEASE_IMAGES = _fenced(
    _RELEASE
    + """
for i = 2, #ARGV do release(KEYS[2], KEYS[3], KEYS[4], ARGV[i]) end
return #ARGV - 1
"""
)

# KEYS: stream, held, counts, images. ARGV: group, how many images come along, their digests and
# bytes in turn, then per entry: its id, its number, how many images it needs, their digests. Counts
# each number as one that needs its images, once, while its entry is in somebody's hands. Returns
# for each 1 when they are held, 0 when the entry is not pending any more, or the digests whose
# bytes are needed first.
HOLD_IMAGES = Script("""
local brought, replies, at = {}, {}, 3 + 2 * tonumber(ARGV[2])
for i = 3, at - 1, 2 do brought[ARGV[i]] = ARGV[i + 1] end
local function missing(first, last)
  local found = {}
  for i = first, last do
    if not brought[ARGV[i]] and redis.call('HEXISTS', KEYS[4], ARGV[i]) == 0 then found[#found + 1] = ARGV[i] end
  end
  return found
end
local function hold(number, first, last)
  local before = redis.call('HGET', KEYS[2], number) or ''
  local held = before
  for i = first, last do
    if not string.find(held, ARGV[i], 1, true) then
      if brought[ARGV[i]] then redis.call('HSETNX', KEYS[4], ARGV[i], brought[ARGV[i]]) end
      redis.call('HINCRBY', KEYS[3], ARGV[i], 1)
      held = held .. ' ' .. ARGV[i]
    end
  end
  if held ~= before then redis.call('HSET', KEYS[2], number, held) end
end
while at <= #ARGV do
  local id, number, first = ARGV[at], ARGV[at + 1], at + 3
  local last = first + tonumber(ARGV[at + 2]) - 1
  local reply = 0
  if #redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1) == 1 then
    local wanted = missing(first, last)
    reply = #wanted > 0 and wanted or 1
    if reply == 1 then hold(number, first, last) end
  end
  replies[#replies + 1] = reply
  at = last + 1
end
return replies
""")

# KEYS: images. Returns how many there are, and their bytes, without moving them to the client.
COUNT_IMAGES = Script("""
local digests, bytes = redis.call('HKEYS', KEYS[1]), 0
for _, digest in ipairs(digests) do bytes = bytes + redis.call('HSTRLEN', KEYS[1], digest) end
return {#digests, bytes}
""")

# KEYS: epoch, key. ARGV: epoch, value.
SET_KEY = _fenced("""
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[2], ARGV[2])
return 1
""")

# KEYS: epoch, key. ARGV: epoch.
CLEAR_KEY = _fenced("""
return redis.call('DEL', KEYS[2])
""")

# KEYS: scores, used, clock. ARGV: digests. Returns a value or false for each, and marks those that
# it has as used now, unless Redis is out of memory.
RECALL_SCORES = Script("""
local found = {}
for i = 1, #ARGV do
  local value = redis.call('HGET', KEYS[1], ARGV[i])
  found[i] = value
  local now = value and redis.pcall('INCR', KEYS[3])
  if type(now) == 'number' then redis.pcall('ZADD', KEYS[2], 'XX', now, ARGV[i]) end
end
return found
""")

# KEYS: scores, used, clock, bytes. ARGV: most entries, most bytes, then digest, value, … Forgets
# the least recently used.
KEEP_SCORES = Script("""
for i = 3, #ARGV, 2 do
  if redis.call('HSETNX', KEYS[1], ARGV[i], ARGV[i + 1]) == 1 then redis.call('INCRBY', KEYS[4], #ARGV[i + 1]) end
  redis.call('ZADD', KEYS[2], redis.call('INCR', KEYS[3]), ARGV[i])
end
local most, bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
while redis.call('ZCARD', KEYS[2]) > most or tonumber(redis.call('GET', KEYS[4])) > bytes do
  local oldest = redis.call('ZPOPMIN', KEYS[2])[1]
  if not oldest then break end
  redis.call('DECRBY', KEYS[4], redis.call('HSTRLEN', KEYS[1], oldest))
  redis.call('HDEL', KEYS[1], oldest)
end
return 1
""")

# KEYS: spent. ARGV: me, my total so far. Returns the total of all. A total never falls: my
# predecessor may have had my name. The HDEL is for a Redis that is out of memory.
SPENT = Script("""
local before = tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or 0)
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HSET', KEYS[1], ARGV[1], math.max(before, tonumber(ARGV[2])))
local total = 0
for _, spent in ipairs(redis.call('HVALS', KEYS[1])) do total = total + tonumber(spent) end
return total
""")
