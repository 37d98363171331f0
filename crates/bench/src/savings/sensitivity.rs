//! What other fingerprints find: number of chunks and their size (paper, section 7.8).

use std::collections::BTreeMap;

use anyhow::Result;
use medes_core::Layout;
use medes_pages::FingerprintConfig;
use medes_registry::{Registry, Scope};
use serde::Serialize;

use super::{Group, LayoutSavings, gone, layout_name};
use crate::mean;
use crate::testbed::Testbed;

/// Chunks of a fingerprint, and their bytes.
const VARIANTS: [(u8, u16); 5] = [(5, 64), (10, 64), (20, 64), (5, 32), (5, 128)];

/// One kind of fingerprint, with one layout and choice of bases.
#[derive(Clone, Debug, Serialize)]
pub struct Sensitivity {
    /// The sandboxes' layout.
    pub layout: &'static str,
    /// Which functions' bases.
    pub bases: &'static str,
    /// Chunks in a fingerprint.
    pub cardinality: u8,
    /// Bytes in a chunk.
    pub chunk_size: u16,
    /// The share that is saved of the first sandbox: mean of the functions.
    pub saved_mean: f64,
    /// By function, in the order of `functions`.
    pub saved: Vec<f64>,
    /// Entries in the registry, mean of the functions.
    pub registry_entries: u64,
    /// Bytes of each function's image.
    #[serde(skip)]
    images: Vec<u64>,
}

/// What of a layout is varied: the bases for which fingerprints matter most.
fn bases(layout: Layout) -> (Scope, &'static str) {
    match layout {
        Layout::Function | Layout::Random => (Scope::SameFunction, "same"),
        Layout::Shared => (Scope::OtherFunctions, "others"),
    }
}

/// Estimates the images; [`Sensitivity::complete`] makes shares of them.
pub(super) fn measure(
    testbed: &Testbed,
    group: &Group<'_>,
    layout: Layout,
) -> Result<Vec<Sensitivity>> {
    let (scope, name) = bases(layout);
    let variants = VARIANTS.into_iter().map(|(cardinality, chunk_size)| {
        let config = FingerprintConfig::new(cardinality, chunk_size)?;
        let (mut images, mut entries) = (Vec::new(), 0);
        for sandboxes in &group.sandboxes {
            let own = sandboxes.spec.id;
            let bank = group.bank(config, |of| (of == own) == (scope == Scope::SameFunction))?;
            entries += bank.registry().stats().entries;
            images.push(sandboxes.estimate_first(testbed, &bank, scope)?);
        }
        Ok(Sensitivity {
            layout: layout_name(layout),
            bases: name,
            cardinality,
            chunk_size,
            saved_mean: 0.0,
            saved: Vec::new(),
            registry_entries: entries / (group.sandboxes.len() as u64).max(1),
            images,
        })
    });
    variants.collect()
}

impl Sensitivity {
    /// Computes the shares, now that the real operations have told what remains in the sandboxes.
    pub(super) fn complete(&mut self, functions: &[BTreeMap<&'static str, LayoutSavings>]) {
        let measured = functions.iter().filter_map(|f| f.get(self.layout));
        let saved = measured.zip(&self.images).map(|(f, image)| {
            let remains = f.dedup_bytes - f.dedup.store + image;
            gone(remains, f.warm_bytes)
        });
        self.saved = saved.collect();
        self.saved_mean = mean(self.saved.iter().copied());
    }
}
