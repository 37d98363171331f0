//! Deploying, changing and removing functions.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use medes_core::{DomainId, FunctionId, FunctionName, FunctionSpec, Layout, Tenant};
use medes_node::NodeApi;
use medes_policy::FunctionSettings;

use crate::code::CodeSource;
use crate::controller::{Controller, Inner};
use crate::error::{DeployError, StoreError};
use crate::store::Deployed;

/// A function to be deployed.
#[derive(Clone, Debug)]
pub struct Deploy {
    /// Its name.
    pub name: FunctionName,
    /// The runtime, such as `python3.11`.
    pub runtime: String,
    /// The handler, in the runtime's own notation.
    pub handler: String,
    /// The code.
    pub code: CodeSource,
    /// Directories (used where they are) or zip files (unpacked into the data directory).
    pub layers: Vec<PathBuf>,
    /// Environment variables.
    pub environment: BTreeMap<String, String>,
    /// Memory limit of one sandbox, MiB.
    pub memory_mib: u32,
    /// How long one request may run, milliseconds.
    pub timeout_ms: u64,
    /// At most this many sandboxes at once; 0 for the controller's default.
    pub max_sandboxes: u32,
    /// Which sandboxes share one address-space layout.
    pub layout: Layout,
    /// Whose function it is.
    pub tenant: Tenant,
    /// A description.
    pub description: String,
    /// See [`Deployed::labels`].
    pub labels: BTreeMap<String, String>,
    /// See [`Deployed::settings`]; `None` leaves what was set for an older version, if any.
    pub settings: Option<FunctionSettings>,
}

impl Deploy {
    /// A deployment with the usual settings: 256 MiB, 30 s, one layout per function.
    #[must_use]
    pub fn new(name: FunctionName, runtime: &str, handler: &str, code: CodeSource) -> Self {
        Self {
            name,
            runtime: runtime.to_owned(),
            handler: handler.to_owned(),
            code,
            layers: Vec::new(),
            environment: BTreeMap::new(),
            memory_mib: 256,
            timeout_ms: 30_000,
            max_sandboxes: 0,
            layout: Layout::default(),
            tenant: Tenant::default(),
            description: String::new(),
            labels: BTreeMap::new(),
            settings: None,
        }
    }
}

/// What to do if there is a function of that name already.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeployMode {
    /// Refuse.
    Create,
    /// Replace it.
    Replace,
}

/// A change to a deployed function; what is `None` stays as it is.
#[derive(Clone, Debug, Default)]
pub struct Change {
    /// Only if the function still is this version.
    pub expected: Option<FunctionId>,
    /// New code.
    pub code: Option<CodeSource>,
    /// Another runtime.
    pub runtime: Option<String>,
    /// Another handler.
    pub handler: Option<String>,
    /// Other layers.
    pub layers: Option<Vec<PathBuf>>,
    /// Other environment variables.
    pub environment: Option<BTreeMap<String, String>>,
    /// Another memory limit, MiB.
    pub memory_mib: Option<u32>,
    /// Another time limit, milliseconds.
    pub timeout_ms: Option<u64>,
    /// Another description.
    pub description: Option<String>,
    /// Labels to be set, beside those that are there.
    pub labels: BTreeMap<String, String>,
}

impl<N: NodeApi> Controller<N> {
    /// Deploys a function. An older version of that name serves the requests that wait for it,
    /// then it goes.
    ///
    /// The layout seed is drawn at the first deployment of a name and stays for all later ones:
    /// versions mostly share their runtime and libraries, so a new version's sandboxes find their
    /// pages among those of the old one while both are there. Removing the function and deploying
    /// it again draws another.
    ///
    /// # Errors
    /// If a setting, the code or a layer can't be used, or the state can't be written.
    pub async fn deploy(
        &self,
        deploy: Deploy,
        mode: DeployMode,
    ) -> Result<Arc<Deployed>, DeployError> {
        let inner = self.inner.clone();
        to_its_end(async move { inner.deploy(deploy, mode).await }).await
    }

    /// Changes a deployed function: the result is a new version.
    ///
    /// # Errors
    /// If there is no such function, it was changed meanwhile, or as for [`Controller::deploy`].
    pub async fn change(
        &self,
        name: &FunctionName,
        change: Change,
    ) -> Result<Arc<Deployed>, DeployError> {
        let (inner, name) = (self.inner.clone(), name.clone());
        to_its_end(async move { inner.change_function(&name, change).await }).await
    }

    /// Removes a function: requests that wait are refused, those that run may end.
    ///
    /// # Errors
    /// If there is no such function, or the state can't be written.
    pub async fn remove(&self, name: &FunctionName) -> Result<(), DeployError> {
        let (inner, name) = (self.inner.clone(), name.clone());
        to_its_end(async move { inner.remove_function(&name).await }).await
    }
}

/// Runs a change in a task of its own: a caller that goes away must not leave it half done.
pub(crate) async fn to_its_end<T: Send + 'static>(
    change: impl Future<Output = Result<T, DeployError>> + Send + 'static,
) -> Result<T, DeployError> {
    match tokio::spawn(change).await {
        Ok(result) => result,
        Err(e) => Err(failed_task(e)),
    }
}

fn failed_task(e: tokio::task::JoinError) -> DeployError {
    let source = std::io::Error::other(e);
    StoreError::Io { path: "the data directory".into(), source }.into()
}

impl<N: NodeApi> Inner<N> {
    async fn deploy(
        self: &Arc<Self>,
        deploy: Deploy,
        mode: DeployMode,
    ) -> Result<Arc<Deployed>, DeployError> {
        let inner = self;
        let _changing = inner.changing.lock().await;
        if let Some(settings) = &deploy.settings {
            settings.check()?;
        }
        let old = inner.with(|t, _| t.function(&deploy.name));
        if old.is_some() && mode == DeployMode::Create {
            return Err(DeployError::Exists(deploy.name));
        }
        let spec = FunctionSpec {
            id: FunctionId(0),
            name: deploy.name,
            tenant: deploy.tenant,
            domain: DomainId::default(),
            runtime: deploy.runtime,
            handler: deploy.handler,
            code: PathBuf::new(),
            code_sha256: String::new(),
            code_size: 0,
            layers: Vec::new(),
            environment: deploy.environment,
            memory_mib: deploy.memory_mib,
            timeout_ms: deploy.timeout_ms,
            max_sandboxes: deploy.max_sandboxes,
            layout: deploy.layout,
            layout_seed: 0,
            description: deploy.description,
            deployed_at_ms: 0,
        };
        let kept_settings = old.as_ref().map(|o| o.settings).unwrap_or_default();
        let kept_seed = old
            .filter(|o| (o.spec.layout == Layout::Shared) == (spec.layout == Layout::Shared))
            // Another tenant must not know the layout.
            .filter(|o| o.spec.tenant == spec.tenant)
            .map(|o| o.spec.layout_seed);
        let settings = deploy.settings.unwrap_or(kept_settings);
        let deployed = Deployed { spec, labels: deploy.labels, settings };
        inner.put(deployed, Some(deploy.code), Some(deploy.layers), kept_seed).await
    }

    async fn change_function(
        self: &Arc<Self>,
        name: &FunctionName,
        change: Change,
    ) -> Result<Arc<Deployed>, DeployError> {
        let inner = self;
        let _changing = inner.changing.lock().await;
        let old = inner
            .with(|t, _| t.function(name))
            .ok_or_else(|| DeployError::NoSuchFunction(name.clone()))?;
        if change.expected.is_some_and(|id| id != old.spec.id) {
            return Err(DeployError::StaleRevision(name.clone()));
        }
        let mut next = (*old).clone();
        let spec = &mut next.spec;
        fn set<T>(field: &mut T, value: Option<T>) {
            if let Some(value) = value {
                *field = value;
            }
        }
        set(&mut spec.runtime, change.runtime);
        set(&mut spec.handler, change.handler);
        set(&mut spec.environment, change.environment);
        set(&mut spec.memory_mib, change.memory_mib);
        set(&mut spec.timeout_ms, change.timeout_ms);
        set(&mut spec.description, change.description);
        next.labels.extend(change.labels);
        let seed = Some(old.spec.layout_seed);
        inner.put(next, change.code, change.layers, seed).await
    }

    async fn remove_function(self: &Arc<Self>, name: &FunctionName) -> Result<(), DeployError> {
        let inner = self;
        let _changing = inner.changing.lock().await;
        if inner.with(|t, _| t.function(name)).is_none() {
            return Err(DeployError::NoSuchFunction(name.clone()));
        }
        let store = inner.store.clone();
        let key = name.clone();
        blocking(move || store.remove(key.as_str())).await?;
        inner.with(|t, now| t.uninstall(now, name));
        tracing::info!(function = %name, "removed");
        Ok(())
    }

    /// Checks, stores and installs a version; the caller holds `changing`.
    async fn put(
        self: &Arc<Self>,
        mut deployed: Deployed,
        code: Option<CodeSource>,
        layers: Option<Vec<PathBuf>>,
        kept_seed: Option<u64>,
    ) -> Result<Arc<Deployed>, DeployError> {
        if self.with(|t, _| t.is_closing()) {
            return Err(DeployError::ShuttingDown);
        }
        let installed = self.node.runtimes();
        check(&deployed.spec)?;
        if !installed.contains(&deployed.spec.runtime) {
            let wanted = deployed.spec.runtime;
            return Err(DeployError::NoRuntime { wanted, installed });
        }
        let (store, codes) = (self.store.clone(), self.code.clone());
        let group = self.config.dedup_group(&deployed.spec.tenant).to_owned();
        let written = blocking(move || {
            let spec = &mut deployed.spec;
            if let Some(source) = &code {
                let stored = codes.add(source)?;
                spec.code = stored.path;
                spec.code_sha256 = stored.sha256;
                spec.code_size = stored.size;
            }
            if let Some(layers) = &layers {
                spec.layers =
                    layers.iter().map(|l| codes.add_layer(l)).collect::<Result<_, _>>()?;
            }
            spec.domain = store.domain(&group)?;
            spec.layout_seed = match (kept_seed, spec.layout) {
                (Some(seed), _) => seed,
                (None, Layout::Shared) => store.domain_seed(spec.domain, crate::random)?,
                (None, Layout::Function | Layout::Random) => crate::random(),
            };
            spec.id = store.next_function()?;
            spec.deployed_at_ms =
                SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
            store.put(&deployed)?;
            Ok::<_, DeployError>(Arc::new(deployed))
        })
        .await;
        match written {
            Ok(deployed) => {
                self.with(|t, now| t.install(now, deployed.clone()));
                let spec = &deployed.spec;
                tracing::info!(function = %spec.name, version = spec.id.0, "deployed");
                Ok(deployed)
            }
            Err(e) => {
                // What was unpacked before the failure belongs to nobody.
                if let Err(e) = self.remove_unused_code().await {
                    tracing::warn!(error = %e, "unused code remains on disk");
                }
                Err(e)
            }
        }
    }

    /// Removes code that no version uses any more.
    pub(crate) async fn clean_up_code(self: &Arc<Self>) -> Result<(), DeployError> {
        let _changing = self.changing.lock().await;
        self.remove_unused_code().await
    }

    async fn remove_unused_code(self: &Arc<Self>) -> Result<(), DeployError> {
        let used: Vec<PathBuf> = self
            .with(|t, _| t.all_versions())
            .iter()
            .flat_map(|d| std::iter::once(&d.spec.code).chain(&d.spec.layers).cloned())
            .collect();
        let codes = self.code.clone();
        blocking(move || {
            Ok::<_, DeployError>(codes.keep_only(|path| used.iter().any(|u| u == path))?)
        })
        .await
    }
}

fn check(spec: &FunctionSpec) -> Result<(), DeployError> {
    let is = |fits: bool, setting: &'static str, message: &str| {
        if fits {
            return Ok(());
        }
        Err(DeployError::Invalid { setting, message: message.to_owned() })
    };
    let handler = &spec.handler;
    let handler_fits = (1..=128).contains(&handler.len())
        && !handler.chars().any(|c| c.is_whitespace() || c.is_control());
    is(handler_fits, "handler", "1 to 128 characters without blanks, such as app.handler")?;
    is((32..=32_768).contains(&spec.memory_mib), "memory_mib", "32 to 32768")?;
    is((1..=5_400_000).contains(&spec.timeout_ms), "timeout_ms", "1 to 5400000 (90 minutes)")?;
    let size: usize = spec.environment.iter().map(|(k, v)| k.len() + v.len()).sum();
    is(size <= 64 << 10, "environment", "at most 64 KiB, names and values together")?;
    for (name, value) in &spec.environment {
        let fits = !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0');
        is(fits, "environment", &format!("{name:?} is no variable, or its value has a NUL"))?;
    }
    Ok(())
}

pub(crate) async fn blocking<T, E>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, DeployError>
where
    T: Send + 'static,
    E: Into<DeployError> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Into::into),
        Err(e) => Err(failed_task(e)),
    }
}
