-- Deletes a worker's heartbeat, and its consumer unless entries are pending with it: with the
-- consumer, Redis would forget that they were ever handed out.
-- KEYS: stream, workers. ARGV: group, worker.
-- Returns 1 when the consumer was deleted, else 0.
-- Safe to repeat: deletes only, so a full Redis takes it too.
redis.call('HDEL', KEYS[2], ARGV[2])
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) == 0 then
  redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
  return 1
end
return 0
