-- Gives the trainer's lease up.
-- Fenced. KEYS: epoch, lease. ARGV: epoch, holder.
-- Returns 1 when the lease was the holder's, else 0.
-- Safe to repeat: deletes only what is the holder's own.
if redis.call('GET', KEYS[2]) == ARGV[2] then return redis.call('DEL', KEYS[2]) end
return 0
