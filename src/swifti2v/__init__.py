"""SwiftI2V: one photo and a sentence in, a 2K video out, segment by segment."""
