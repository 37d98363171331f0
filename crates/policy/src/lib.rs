//! When a sandbox goes warm, dedup or away: pure decisions.
