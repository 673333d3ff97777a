-- Notes that a worker of a stage has been ready once.
-- KEYS: ready. ARGV: stage.
-- Safe to repeat: a set. SREM comes first and frees memory, for a full Redis.
redis.call('SREM', KEYS[1], ARGV[1])
return redis.call('SADD', KEYS[1], ARGV[1])
