//! What survives a restart: functions, seeds and the number of the next version.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use medes_core::{DomainId, FunctionId, FunctionSpec};
use medes_policy::{FunctionSettings, PolicySettings};
use parking_lot::RwLock;
use redb::{Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::StoreError;

/// Records by function name: one version byte, then JSON.
const FUNCTIONS: TableDefinition<&str, &[u8]> = TableDefinition::new("functions");
/// Layout seeds shared in a domain, by the domain's number.
const SEEDS: TableDefinition<u32, u64> = TableDefinition::new("domain_seeds");
/// Counters by name.
const COUNTERS: TableDefinition<&str, u64> = TableDefinition::new("counters");
/// Numbers of dedup domains, by the name of the group of tenants.
const DOMAINS: TableDefinition<&str, u32> = TableDefinition::new("domains");

/// Settings by name: one version byte, then JSON.
const SETTINGS: TableDefinition<&str, &[u8]> = TableDefinition::new("settings");

const POLICY: &str = "policy";
const NEXT_FUNCTION: &str = "next_function";
const RECORD_VERSION: u8 = 1;

/// A function as it is deployed.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Deployed {
    /// What a node needs to know of it.
    pub spec: FunctionSpec,
    /// What a client's dialect wants to find again, such as the role that it named. The platform
    /// itself makes nothing of it.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// What the operator wants of the policy for this function alone.
    #[serde(default)]
    pub settings: FunctionSettings,
}

/// The embedded database in the data directory. It holds secrets (layout seeds, environment
/// variables), so only its owner may read it.
pub(crate) struct Store {
    /// After a failed write the database takes nothing more until it is opened again (a full disk
    /// may have room by then). `None` while it could not be.
    database: RwLock<Option<Database>>,
    path: PathBuf,
}

impl Store {
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        let failed = |source: redb::Error| StoreError::Database {
            path: path.display().to_string(),
            source: Box::new(source),
        };
        let database = Database::create(path).map_err(|e| failed(e.into()))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
            .map_err(|source| StoreError::Io { path: path.display().to_string(), source })?;
        let store = Self { database: RwLock::new(Some(database)), path: path.to_owned() };
        store.write(|t| {
            t.open_table(FUNCTIONS)?;
            t.open_table(SEEDS)?;
            t.open_table(COUNTERS)?;
            t.open_table(DOMAINS)?;
            t.open_table(SETTINGS)?;
            Ok(())
        })?;
        Ok(store)
    }

    /// All functions, by name.
    pub(crate) fn functions(&self) -> Result<Vec<Deployed>, StoreError> {
        let mut found = Vec::new();
        self.read(|t| {
            for row in t.open_table(FUNCTIONS)?.iter()? {
                let (key, value) = row?;
                found.push((key.value().to_owned(), value.value().to_vec()));
            }
            Ok(())
        })?;
        found.into_iter().map(|(key, bytes)| self.record(key, &bytes)).collect()
    }

    fn record<T: DeserializeOwned>(&self, key: String, bytes: &[u8]) -> Result<T, StoreError> {
        decode(bytes).map_err(|message| StoreError::Record {
            path: self.path.display().to_string(),
            key,
            message,
        })
    }

    /// The policy that was set live; `None` if that of the configuration holds.
    pub(crate) fn policy(&self) -> Result<Option<PolicySettings>, StoreError> {
        let mut found = None;
        self.read(|t| {
            found = t.open_table(SETTINGS)?.get(POLICY)?.map(|v| v.value().to_vec());
            Ok(())
        })?;
        found.map(|bytes| self.record(POLICY.to_owned(), &bytes)).transpose()
    }

    /// Writes the policy that was set live, or that there is none; returns once it is on disk.
    pub(crate) fn set_policy(&self, settings: Option<&PolicySettings>) -> Result<(), StoreError> {
        let record = settings.map(encode);
        self.write(|t| {
            let mut table = t.open_table(SETTINGS)?;
            match &record {
                Some(bytes) => table.insert(POLICY, bytes.as_slice())?,
                None => table.remove(POLICY)?,
            };
            Ok(())
        })
    }

    /// Writes one function; returns once it is on disk.
    pub(crate) fn put(&self, function: &Deployed) -> Result<(), StoreError> {
        let record = encode(function);
        self.write(|t| {
            t.open_table(FUNCTIONS)?
                .insert(function.spec.name.as_str(), record.as_slice())
                .map(|_| ())
                .map_err(Into::into)
        })
    }

    /// Removes one function; returns once that is on disk.
    pub(crate) fn remove(&self, name: &str) -> Result<(), StoreError> {
        self.write(|t| t.open_table(FUNCTIONS)?.remove(name).map(|_| ()).map_err(Into::into))
    }

    /// A number that no version of any function had before.
    pub(crate) fn next_function(&self) -> Result<FunctionId, StoreError> {
        let mut next = 1;
        self.write(|t| {
            let mut table = t.open_table(COUNTERS)?;
            next = table.get(NEXT_FUNCTION)?.map_or(1, |v| v.value());
            table.insert(NEXT_FUNCTION, next + 1)?;
            Ok(())
        })?;
        Ok(FunctionId(next))
    }

    /// The number of a group of tenants; drawn at the first use, never used for another.
    pub(crate) fn domain(&self, group: &str) -> Result<DomainId, StoreError> {
        let mut number = 0;
        self.write(|t| {
            let mut table = t.open_table(DOMAINS)?;
            let known = table.get(group)?.map(|v| v.value());
            number = match known {
                Some(number) => number,
                None => u32::try_from(table.len()?).unwrap_or(u32::MAX),
            };
            if known.is_none() {
                table.insert(group, number)?;
            }
            Ok(())
        })?;
        Ok(DomainId(number))
    }

    /// The layout seed that all functions of a domain share; `draw` makes one if there is none.
    pub(crate) fn domain_seed(
        &self,
        domain: DomainId,
        draw: impl Fn() -> u64,
    ) -> Result<u64, StoreError> {
        let mut seed = 0;
        self.write(|t| {
            let mut table = t.open_table(SEEDS)?;
            let known = table.get(domain.0)?.map(|v| v.value());
            seed = known.unwrap_or_else(&draw);
            if known.is_none() {
                table.insert(domain.0, seed)?;
            }
            Ok(())
        })?;
        Ok(seed)
    }

    fn read(
        &self,
        f: impl FnOnce(&redb::ReadTransaction) -> Result<(), redb::Error>,
    ) -> Result<(), StoreError> {
        self.with(|database| f(&database.begin_read()?))
    }

    fn write(
        &self,
        f: impl FnOnce(&redb::WriteTransaction) -> Result<(), redb::Error>,
    ) -> Result<(), StoreError> {
        self.with(|database| {
            let transaction = database.begin_write()?;
            f(&transaction)?;
            transaction.commit()?;
            Ok(())
        })
    }

    fn with(&self, f: impl FnOnce(&Database) -> Result<(), redb::Error>) -> Result<(), StoreError> {
        let failed = |source| StoreError::Database {
            path: self.path.display().to_string(),
            source: Box::new(source),
        };
        if self.database.read().is_none() {
            self.reopen().map_err(failed)?;
        }
        let result = match &*self.database.read() {
            Some(database) => f(database),
            None => Err(redb::Error::PreviousIo),
        };
        if let Err(redb::Error::Io(_) | redb::Error::PreviousIo) = &result {
            // What comes next says so if this fails.
            let _ = self.reopen();
        }
        result.map_err(failed)
    }

    fn reopen(&self) -> Result<(), redb::Error> {
        let mut database = self.database.write();
        // Closed first: it can't be open twice.
        *database = None;
        *database = Some(Database::create(&self.path)?);
        Ok(())
    }
}

fn encode(record: &impl Serialize) -> Vec<u8> {
    let mut bytes = vec![RECORD_VERSION];
    serde_json::to_writer(&mut bytes, record).expect("a record has a JSON form");
    bytes
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    match bytes.split_first() {
        Some((&RECORD_VERSION, json)) => serde_json::from_slice(json).map_err(|e| e.to_string()),
        Some((other, _)) => Err(format!(
            "it was written by a newer medes (record version {other}, this one knows \
             {RECORD_VERSION})"
        )),
        None => Err("it is empty".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::deployed;

    #[test]
    fn functions_seeds_and_the_policy_survive_a_reopen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.redb");
        let f = deployed("a", 1);
        let policy = PolicySettings { alpha: 3.5, ..PolicySettings::default() };
        let seed = {
            let store = Store::open(&path).unwrap();
            store.put(&f).unwrap();
            store.put(&deployed("b", 2)).unwrap();
            store.remove("b").unwrap();
            assert_eq!(store.next_function().unwrap(), FunctionId(1));
            assert_eq!(store.policy().unwrap(), None);
            store.set_policy(Some(&policy)).unwrap();
            store.domain_seed(DomainId(0), || 42).unwrap()
        };
        let store = Store::open(&path).unwrap();
        assert_eq!(store.functions().unwrap(), [f]);
        assert_eq!(store.policy().unwrap(), Some(policy));
        store.set_policy(None).unwrap();
        assert_eq!(store.policy().unwrap(), None);
        assert_eq!(store.next_function().unwrap(), FunctionId(2));
        assert_eq!(store.domain_seed(DomainId(0), || 43).unwrap(), seed);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_record_of_another_version_is_refused_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("s")).unwrap();
        store
            .write(|t| {
                t.open_table(FUNCTIONS)?.insert("odd", [9u8, b'{'].as_slice())?;
                Ok(())
            })
            .unwrap();
        let text = store.functions().unwrap_err().to_string();
        assert!(text.contains("odd") && text.contains("newer"), "{text}");
    }
}
