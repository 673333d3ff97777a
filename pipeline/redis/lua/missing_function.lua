-- missing(): the stages among ARGV[first] … ARGV[last] that are not in the set of ready ones.
-- Prepended to the scripts that issue tickets.
-- Safe to repeat: it only reads.
local function missing(ready, first, last)
  local stages = {}
  for i = first, last do
    if redis.call('SISMEMBER', ready, ARGV[i]) == 0 then stages[#stages + 1] = ARGV[i] end
  end
  return stages
end
