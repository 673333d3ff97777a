-- Gives entries back: parks those that are still the worker's own as idle for a day, so that the
-- next scan for idle entries hands them on, and takes back the delivery that was counted.
-- KEYS: stream. ARGV: group, worker, parking consumer, ids.
-- Returns how many were parked.
-- Safe to repeat: a parked entry is no longer the worker's own, so a second run passes it over.
local parked = 0
for i = 4, #ARGV do
  local id = ARGV[i]
  local row = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1, ARGV[2])[1]
  if row then
    local deliveries = math.max(row[4] - 1, 0)
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, id,
      'IDLE', 86400000, 'RETRYCOUNT', deliveries, 'JUSTID')
    parked = parked + 1
  end
end
return parked
