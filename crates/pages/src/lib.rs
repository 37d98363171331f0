//! Pages, fingerprints and patches: the pure logic of memory deduplication.
