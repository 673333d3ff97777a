-- Counts the images and their bytes, without sending them to the client.
-- KEYS: images.
-- Returns how many there are, and their bytes.
-- Safe to repeat: reads only.
local digests, bytes = redis.call('HKEYS', KEYS[1]), 0
for _, digest in ipairs(digests) do bytes = bytes + redis.call('HSTRLEN', KEYS[1], digest) end
return {#digests, bytes}
