//! The fingerprint registry at scale: size of an entry, speed of lookups.

use std::time::{Duration, Instant};

use anyhow::Result;
use medes_core::{DomainId, FunctionId, NodeId, SnapshotId};
use medes_pages::{ChunkHash, Fingerprint, MAX_CARDINALITY};
use medes_registry::{LocalRegistry, Near, Registry, RegistryConfig, Scope};
use serde::Serialize;

use crate::{median, round};

/// Chunks in the fingerprint of a page, the paper's choice.
const CHUNKS: usize = 5;

/// Pages of one base snapshot: 78 MB.
const SNAPSHOT: u64 = 20_000;

/// Pages of a lookup, as the dedup operation does.
const BATCH: usize = 256;

/// Pages looked up. Their entries lie in more memory than processors cache.
const LOOKUPS: u64 = 400_000;

/// How often each lookup is timed; the median counts.
const ROUNDS: usize = 5;

/// What a large registry costs.
#[derive(Clone, Debug, Serialize)]
pub struct RegistryFigures {
    /// Entries in the registry.
    pub registry_entries: u64,
    /// Its memory, all included, by entry.
    pub registry_bytes_per_entry: f64,
    /// Chunks of base pages entered a second.
    pub inserts_per_s: f64,
    /// Chunks looked up a second, all of them there, at random places of the table.
    pub lookups_per_s: f64,
    /// The same, none of them there.
    pub lookups_missing_per_s: f64,
}

/// Fills a registry with at least `entries` chunks and times lookups on this thread.
///
/// # Errors
/// If the registry refuses.
pub fn measure(entries: u64) -> Result<RegistryFigures> {
    let registry = LocalRegistry::new(RegistryConfig::default());
    let domain = DomainId(0);
    let pages = entries.div_ceil(CHUNKS as u64).next_multiple_of(SNAPSHOT);
    let mut filling = Duration::ZERO;
    for number in 0..pages / SNAPSHOT {
        let first = number * SNAPSHOT;
        let fingerprints: Vec<(u32, Fingerprint)> =
            (0..SNAPSHOT).map(|n| (n as u32, fingerprint(first + n))).collect();
        let id = SnapshotId { node: NodeId(0), number: number as u32 };
        let start = Instant::now();
        registry.insert(domain, FunctionId(number % 16), id, &fingerprints)?;
        filling += start.elapsed();
    }
    let near = Near { node: NodeId(0), function: FunctionId(0) };
    let speed = |name: &dyn Fn(u64) -> u64| -> Result<f64> {
        let queries: Vec<Fingerprint> = (0..LOOKUPS).map(|n| fingerprint(name(mix(n)))).collect();
        let mut times = vec![Vec::with_capacity(ROUNDS); queries.len().div_ceil(BATCH)];
        let mut found = Vec::new();
        for _ in 0..ROUNDS {
            for (batch, times) in queries.chunks(BATCH).zip(&mut times) {
                found.clear();
                let start = Instant::now();
                registry.lookup_within(domain, near, Scope::Any, batch, &mut found)?;
                times.push(start.elapsed());
            }
        }
        let seconds = times.iter().map(|times| median(times)).sum::<Duration>().as_secs_f64();
        Ok(round((queries.len() * CHUNKS) as f64 / seconds, 0))
    };
    let stats = registry.stats();
    Ok(RegistryFigures {
        registry_entries: stats.entries,
        registry_bytes_per_entry: round(stats.bytes as f64 / stats.entries as f64, 2),
        inserts_per_s: round(stats.entries as f64 / filling.as_secs_f64(), 0),
        lookups_per_s: speed(&|random| random % pages)?,
        lookups_missing_per_s: speed(&|random| pages + random % pages)?,
    })
}

/// The fingerprint of a page that never was.
fn fingerprint(page: u64) -> Fingerprint {
    const { assert!(CHUNKS <= MAX_CARDINALITY) };
    let chunks: [ChunkHash; CHUNKS] =
        std::array::from_fn(|n| ChunkHash(mix(page * CHUNKS as u64 + n as u64)));
    Fingerprint::try_from(&chunks[..]).unwrap_or_default()
}

/// A number that looks random, another for each `n` (SplitMix64).
pub(crate) fn mix(n: u64) -> u64 {
    let mut z = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_registry_is_measured() {
        let figures = measure(100_000).expect("room");
        assert!((99_000..=100_000).contains(&figures.registry_entries), "{figures:?}");
        assert!(figures.registry_bytes_per_entry > 4.0, "{figures:?}");
        assert!(figures.lookups_per_s > 0.0 && figures.inserts_per_s > 0.0);
    }
}
