-- Lets go of the images that numbers hold which were settled without an entry to acknowledge.
-- Fenced; needs release(). KEYS: epoch, images:held, images:counted, images. ARGV: epoch, numbers.
-- Returns how many numbers were given.
-- Safe to repeat, and on a full Redis: as release().
for i = 2, #ARGV do release(KEYS[2], KEYS[3], KEYS[4], ARGV[i]) end
return #ARGV - 1
