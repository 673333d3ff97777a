-- Deletes the consumers and heartbeats of dead workers: those that have nothing pending and were
-- not heard of for a time.
-- KEYS: stream, workers. ARGV: group, that time in ms.
-- Returns how many were deleted. Error: NOGROUP when the stream is gone.
-- Safe to repeat: deletes only, so a full Redis takes it too.
local forgotten = 0
if redis.call('EXISTS', KEYS[1]) == 0 then return redis.error_reply('NOGROUP the stream is gone') end
for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local consumer = {}
  for i = 1, #flat, 2 do consumer[flat[i]] = flat[i + 1] end
  if consumer.pending == 0 and consumer.idle > tonumber(ARGV[2]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer.name)
    redis.call('HDEL', KEYS[2], consumer.name)
    forgotten = forgotten + 1
  end
end
return forgotten
