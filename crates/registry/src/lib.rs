//! The fingerprint registry: which base pages hold a chunk.
