-- Issues tickets, all or none, and closes the operator requests that some of them serve.
-- Fenced. KEYS: epoch, ready, issued, tickets, requests, requeued, then the streams whose backlog
-- counts. ARGV: epoch, number of stages that must be ready, number of requests, expected count of
-- issued tickets, largest backlog, then those stages, then per request its id, the new number and
-- the dead one, then per ticket its number and payload.
-- Returns 1 when the tickets stand issued, 0 when a backlog is larger than that, or the stages that
-- are not ready.
-- Errors: DATALOST when fewer tickets are known than expected; MISCOUNT for any other count.
-- Safe to repeat: a second run finds the count raised already and returns 1. INCRBY is the first
-- write; a full Redis refuses it, and with it the whole call.
local requests = 6 + tonumber(ARGV[2])
local first = requests + 3 * tonumber(ARGV[3])
local count = (#ARGV - first + 1) / 2
local issued, expected = tonumber(redis.call('GET', KEYS[3]) or 0), tonumber(ARGV[4])
if issued >= expected + count then return 1 end
local awaited = missing(KEYS[2], 6, requests - 1)
if #awaited > 0 then return awaited end
if issued < expected then
  return redis.error_reply('DATALOST ' .. issued .. ' tickets are known, not ' .. expected)
end
if issued ~= expected then
  return redis.error_reply('MISCOUNT ' .. issued .. ' tickets were issued, not ' .. expected)
end
for i = 7, #KEYS do
  if redis.call('XLEN', KEYS[i]) > tonumber(ARGV[5]) then return 0 end
end
redis.call('INCRBY', KEYS[3], count)
for i = requests, first - 1, 3 do
  redis.call('XDEL', KEYS[5], ARGV[i])
  redis.call('HSET', KEYS[6], ARGV[i + 1], ARGV[i + 2])
end
for i = first, #ARGV, 2 do redis.call('XADD', KEYS[4], '*', 'n', ARGV[i], 'b', ARGV[i + 1]) end
return 1
