//! The timed work: the same pages, copied, fingerprinted, encoded, decoded.

use std::hint::black_box;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use medes_agent::encode::{PageEncoder, PageSource};
use medes_core::FunctionId;
use medes_pages::{Decoder, Fingerprinter, PAGE_SIZE, Page};
use medes_registry::Scope;

use super::Speeds;
use crate::bank::{BATCH, Bank, EncodedBatch};
use crate::dump::Dump;
use crate::{median, round};

/// One sandbox's pages and the base pages for them.
pub(super) struct Material {
    bank: Bank,
    dump: Dump,
    function: FunctionId,
    addresses: Vec<u64>,
    encoded: Vec<EncodedBatch>,
}

/// Bytes gone over, and the time that it took.
#[derive(Clone, Copy, Debug, Default)]
struct Work {
    bytes: u64,
    time: Duration,
}

/// The time for each [`Operation`].
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Times([Work; Operation::ALL.len()]);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Operation {
    Copy,
    Fingerprint,
    FingerprintCold,
    Encode,
    EncodeElsewhere,
    Decode,
    DecodePatches,
    CopyInCache,
}

impl Operation {
    const ALL: [Self; 8] = [
        Self::Copy,
        Self::Fingerprint,
        Self::FingerprintCold,
        Self::Encode,
        Self::EncodeElsewhere,
        Self::Decode,
        Self::DecodePatches,
        Self::CopyInCache,
    ];

    /// Whether it works on pages that have just been read into a buffer, as a dedup operation does.
    fn is_of_dedup(self) -> bool {
        matches!(self, Self::Fingerprint | Self::Encode | Self::EncodeElsewhere)
    }
}

impl Material {
    pub(super) fn new(bank: Bank, dump: Dump, function: FunctionId) -> Result<Self> {
        let encoded = bank.encode(&dump, function, Scope::SameFunction)?;
        let addresses = dump.places().map(|(address, _)| address).collect();
        Ok(Self { bank, dump, function, addresses, encoded })
    }

    pub(super) fn pages(&self) -> usize {
        self.dump.pages().len()
    }

    /// The pages of a batch.
    fn range(&self, batch: usize) -> Range<usize> {
        batch * BATCH..((batch + 1) * BATCH).min(self.pages())
    }

    pub(super) fn patch_bytes(&self) -> u64 {
        self.encoded.iter().map(|b| b.patches.len() as u64).sum()
    }
}

/// Times all operations over all materials.
pub(super) fn time(materials: &[Material], rounds: usize) -> Result<Vec<Times>> {
    let own: Vec<_> =
        materials.iter().map(|m| m.bank.own(m.function, Scope::SameFunction)).collect();
    let mut benches: Vec<Bench<'_>> =
        materials.iter().zip(&own).map(|(m, own)| Bench::new(m, own)).collect();
    for _ in 0..rounds {
        for operation in Operation::ALL {
            benches.iter_mut().try_for_each(|bench| bench.go_over(operation))?;
        }
    }
    Ok(benches.iter().map(Bench::times).collect())
}

/// What one material is worked on with.
struct Bench<'m> {
    material: &'m Material,
    fingerprinter: Fingerprinter,
    at_address: PageEncoder<'m>,
    elsewhere: PageEncoder<'m>,
    decoder: Decoder,
    out: EncodedBatch,
    /// Touched before: what the first touch of new memory costs is the kernel's.
    target: Vec<Page>,
    /// Two batches, reused.
    buffers: Vec<Page>,
    /// By batch and operation, one for each round.
    times: Vec<[Vec<Duration>; Operation::ALL.len()]>,
}

impl<'m> Bench<'m> {
    fn new(material: &'m Material, own: &'m [std::sync::Arc<medes_store::Snapshot>]) -> Self {
        let Material { bank, function, .. } = material;
        let pages = material.pages();
        Self {
            material,
            fingerprinter: Fingerprinter::default(),
            at_address: bank.encoder(*function, Scope::SameFunction, own),
            elsewhere: bank.encoder(*function, Scope::SameFunction, &[]),
            decoder: Decoder::new(),
            out: EncodedBatch::default(),
            target: vec![[0xff; PAGE_SIZE]; pages],
            buffers: vec![[0xff; PAGE_SIZE]; 2 * BATCH],
            times: vec![Default::default(); pages.div_ceil(BATCH)],
        }
    }

    fn go_over(&mut self, operation: Operation) -> Result<()> {
        for batch in 0..self.times.len() {
            if operation.is_of_dedup() {
                let pages = &self.material.dump.pages()[self.material.range(batch)];
                self.buffers[..pages.len()].copy_from_slice(pages);
            }
            let start = Instant::now();
            self.work(operation, batch)?;
            let time = start.elapsed();
            self.times[batch][operation as usize].push(time);
        }
        let as_it_was = operation != Operation::Decode || self.target == self.material.dump.pages();
        ensure!(as_it_was, "decoding gave other pages than were encoded");
        Ok(())
    }

    fn work(&mut self, operation: Operation, batch: usize) -> Result<()> {
        let material = self.material;
        let range = material.range(batch);
        let pages = black_box(&material.dump.pages()[range.clone()]);
        let target = &mut self.target[range.clone()];
        match operation {
            Operation::Copy => {
                for (page, target) in pages.iter().zip(&mut *target) {
                    target.copy_from_slice(black_box(page));
                }
                black_box(target);
            }
            Operation::CopyInCache => {
                let (from, to) = self.buffers.split_at_mut(BATCH);
                to.copy_from_slice(black_box(from));
                black_box(to);
            }
            Operation::Fingerprint | Operation::FingerprintCold => {
                let buffer = black_box(&self.buffers[..pages.len()]);
                for page in if operation.is_of_dedup() { buffer } else { pages } {
                    black_box(self.fingerprinter.fingerprint(page));
                }
            }
            Operation::Encode | Operation::EncodeElsewhere => {
                let encoder = match operation {
                    Operation::Encode => &mut self.at_address,
                    _ => &mut self.elsewhere,
                };
                self.out.sources.clear();
                self.out.patches.clear();
                let addresses = &material.addresses[range];
                let EncodedBatch { sources, patches } = &mut self.out;
                let buffer = black_box(&self.buffers[..pages.len()]);
                encoder.encode(addresses, buffer, &[], sources, patches)?;
            }
            Operation::Decode | Operation::DecodePatches => {
                let all = operation == Operation::Decode;
                decode(&material.bank, &material.encoded[batch], &mut self.decoder, target, all)?;
                black_box(target);
            }
        }
        Ok(())
    }

    fn times(&self) -> Times {
        let is_patch = |s: &&PageSource| matches!(s, PageSource::Patch { .. });
        let sources = self.material.encoded.iter().flat_map(|b| &b.sources);
        let patches = sources.filter(is_patch).count();
        Times(Operation::ALL.map(|operation| {
            let pages = match operation {
                Operation::DecodePatches => patches,
                Operation::CopyInCache => self.times.len() * BATCH,
                _ => self.material.pages(),
            };
            let times = self.times.iter().map(|times| median(&times[operation as usize]));
            Work { bytes: (pages * PAGE_SIZE) as u64, time: times.sum() }
        }))
    }
}

/// Brings the pages of a batch back, all of them or only those that are patches.
fn decode(
    bank: &Bank,
    batch: &EncodedBatch,
    decoder: &mut Decoder,
    target: &mut [Page],
    all: bool,
) -> Result<()> {
    let mut patches = batch.patches.as_slice();
    for (source, page) in batch.sources.iter().zip(target) {
        match source {
            PageSource::Zero if all => page.fill(0),
            PageSource::Base(at) if all => {
                page.copy_from_slice(bank.page(*at).context("no base page")?);
            }
            PageSource::Zero | PageSource::Base(_) => {}
            PageSource::Patch { length, base, .. } => {
                let (patch, rest) = patches.split_at(usize::from(*length));
                patches = rest;
                decoder.decode(patch, base.and_then(|at| bank.page(at)), page)?;
            }
        }
    }
    Ok(())
}

impl Work {
    fn gbps(self) -> f64 {
        let seconds = self.time.as_secs_f64();
        if seconds > 0.0 { round(self.bytes as f64 / seconds / 1e9, 3) } else { 0.0 }
    }
}

impl Times {
    pub(super) fn speeds(self) -> Speeds {
        let [copy, fingerprint, cold, encode, elsewhere, decode, patches, cached] =
            self.0.map(Work::gbps);
        Speeds {
            memcpy_gbps: copy,
            memcpy_cached_gbps: cached,
            fingerprint_gbps: fingerprint,
            fingerprint_cold_gbps: cold,
            encode_gbps: encode,
            encode_elsewhere_gbps: elsewhere,
            decode_gbps: decode,
            decode_patches_gbps: patches,
        }
    }
}

impl<'a> std::iter::Sum<&'a Times> for Times {
    fn sum<I: Iterator<Item = &'a Times>>(all: I) -> Self {
        let mut sum = Self::default();
        for times in all {
            for (sum, work) in sum.0.iter_mut().zip(times.0) {
                sum.bytes += work.bytes;
                sum.time += work.time;
            }
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::mix;
    use medes_pages::FingerprintConfig;

    #[test]
    fn every_operation_is_timed_over_all_pages() {
        let page = |seed: u64| {
            let mut page: Page = [0; PAGE_SIZE];
            for (word, n) in page.chunks_exact_mut(8).zip(seed * 512..) {
                word.copy_from_slice(&mix(n).to_le_bytes());
            }
            page
        };
        let mut pages: Vec<Page> = (0..300).map(page).collect();
        let base = Dump::from_regions([(0x10_0000, pages.clone())]);
        pages[7] = page(1000);
        pages[8][100] ^= 1;
        pages[9] = [0; PAGE_SIZE];
        let subject = Dump::from_regions([(0x10_0000, pages)]);
        let function = FunctionId(1);
        let bank = Bank::with(FingerprintConfig::default(), [(function, &base)]).expect("a bank");
        let material = Material::new(bank, subject, function).expect("encodes");
        assert!((4096..5000).contains(&material.patch_bytes()), "{}", material.patch_bytes());
        let times = time(&[material], 2).expect("times")[0];
        let pages = times.0.map(|work| work.bytes / PAGE_SIZE as u64);
        assert_eq!(pages, [300, 300, 300, 300, 300, 300, 2, 512]);
        assert!(times.0.iter().all(|work| work.time < Duration::from_secs(60)));
    }
}
