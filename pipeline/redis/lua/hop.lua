-- The hop: moves entries from one stream to the next, or to the dead letters, both ends or neither.
-- KEYS: source, then the targets.
-- ARGV: group, then per entry: its id, how many records come of it, and per record: the target's
-- index in KEYS, the number of strings that follow, and these as field, value, …
-- Returns, per entry: 1 when this call moved it, 0 when somebody else had.
-- Safe to repeat: XACK is the fence. It returns 1 only to the first who finishes the entry,
-- whoever holds it by then, so nothing is written twice. XACK and XDEL come first and free memory:
-- a full Redis takes them, and the XADD after them.
local moved, at = {}, 2
while at <= #ARGV do
  local id, outs = ARGV[at], tonumber(ARGV[at + 1])
  at = at + 2
  local mine = redis.call('XACK', KEYS[1], ARGV[1], id) == 1
  if mine then redis.call('XDEL', KEYS[1], id) end
  for _ = 1, outs do
    local target, strings = KEYS[tonumber(ARGV[at])], tonumber(ARGV[at + 1])
    if mine then redis.call('XADD', target, '*', unpack(ARGV, at + 2, at + 1 + strings)) end
    at = at + 2 + strings
  end
  moved[#moved + 1] = mine and 1 or 0
end
return moved
