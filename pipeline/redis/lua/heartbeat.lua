-- Writes a worker's heartbeat, stamped by the server's clock, and that its stage has been ready.
-- KEYS: workers, ready. ARGV: worker, its state as JSON, the stage it is ready for or ''.
-- Safe to repeat: the last heartbeat counts. HDEL comes first and frees memory: a full Redis takes
-- heartbeats. Readiness is written with every heartbeat, in case Redis has lost it.
redis.call('HDEL', KEYS[1], ARGV[1])
local now = redis.call('TIME')
local stamp = now[1] .. '.' .. string.format('%06d', now[2])
redis.call('HSET', KEYS[1], ARGV[1], stamp .. ' ' .. ARGV[2])
if ARGV[3] ~= '' then redis.call('SADD', KEYS[2], ARGV[3]) end
return 1
