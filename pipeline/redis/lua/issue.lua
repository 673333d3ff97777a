-- Issues tickets, all or none, and closes the operator requests that some of them serve.
-- Fenced. KEYS: epoch, issued, tickets, requests, requeued, then the streams whose backlog counts.
-- ARGV: epoch, expected count of issued tickets, largest backlog, number of requests, then per
-- request its id, the new number and the dead one, then per ticket its number and payload.
-- Returns 1 when the tickets stand issued, 0 when a backlog is larger than that.
-- Errors: DATALOST when fewer tickets are known than expected; MISCOUNT for any other count.
-- Safe to repeat: a second run finds the count raised already and returns 1. INCRBY is the first
-- write; a full Redis refuses it, and with it the whole call.
local first = 5 + 3 * tonumber(ARGV[4])
local count = (#ARGV - first + 1) / 2
local issued, expected = tonumber(redis.call('GET', KEYS[2]) or 0), tonumber(ARGV[2])
if issued >= expected + count then return 1 end
if issued < expected then
  return redis.error_reply('DATALOST ' .. issued .. ' tickets are known, not ' .. expected)
end
if issued ~= expected then
  return redis.error_reply('MISCOUNT ' .. issued .. ' tickets were issued, not ' .. expected)
end
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
