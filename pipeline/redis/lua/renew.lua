-- Renews a worker's leases: sets the idle time of entries that are still its own to 0.
-- KEYS: stream. ARGV: group, worker, ids.
-- Returns how many are still its own.
-- Safe to repeat: an entry that another worker has taken over is left alone, and JUSTID keeps the
-- count of deliveries. It adds no memory.
local renewed = 0
for i = 3, #ARGV do
  local id = ARGV[i]
  if #redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1, ARGV[2]) == 1 then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'JUSTID')
    renewed = renewed + 1
  end
end
return renewed
