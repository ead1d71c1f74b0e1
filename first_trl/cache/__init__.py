"""What a teacher cache is: its columns, manifest, shards and folder, and how it is verified. Needs no teacher."""
