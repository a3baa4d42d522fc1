"""Published lists of pairs, keypoints beside pictures, and shards of prepared pictures."""
