//! What several tests need.

use std::collections::BTreeMap;

use medes_core::{DomainId, FunctionId, FunctionSpec, Layout};
use medes_policy::PolicySettings;
use tempfile::TempDir;

use crate::code::CodeSource;
use crate::config::ControllerConfig;
use crate::controller::Controller;
use crate::fake::FakeNode;
use crate::functions::{Deploy, DeployMode};
use crate::store::Deployed;

pub(crate) fn deployed(name: &str, id: u64) -> Deployed {
    Deployed {
        spec: FunctionSpec {
            id: FunctionId(id),
            name: name.parse().unwrap(),
            tenant: medes_core::Tenant::default(),
            domain: DomainId(0),
            runtime: "fake".into(),
            handler: "app.handler".into(),
            code: "/code".into(),
            code_sha256: String::new(),
            code_size: 0,
            layers: vec![],
            environment: BTreeMap::new(),
            memory_mib: 64,
            timeout_ms: 30_000,
            max_sandboxes: 0,
            layout: Layout::Function,
            layout_seed: 99,
            description: String::new(),
            deployed_at_ms: 0,
        },
        labels: BTreeMap::from([("k".into(), "v".into())]),
        settings: medes_policy::FunctionSettings {
            priority: Some(2.0),
            ..medes_policy::FunctionSettings::default()
        },
    }
}

/// A controller over a fake node, with short periods.
pub(crate) struct Rig {
    pub(crate) controller: Controller<FakeNode>,
    pub(crate) node: FakeNode,
    pub(crate) dir: TempDir,
}

pub(crate) fn periods(idle_ms: u64, keep_alive_ms: u64, keep_dedup_ms: u64) -> PolicySettings {
    PolicySettings { idle_ms, keep_alive_ms, keep_dedup_ms, ..PolicySettings::default() }
}

impl Rig {
    pub(crate) fn new(change: impl FnOnce(&mut ControllerConfig)) -> Self {
        Self::with_node(FakeNode::new(1), change)
    }

    pub(crate) fn with_node(
        (node, events): (FakeNode, tokio::sync::mpsc::UnboundedReceiver<medes_node::NodeEvent>),
        change: impl FnOnce(&mut ControllerConfig),
    ) -> Self {
        // In memory: these tests write much and want no disk's durability.
        let shm = std::path::Path::new("/dev/shm");
        let dir = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() };
        let dir = dir.unwrap();
        let mut config =
            ControllerConfig { data_dir: dir.path().to_owned(), ..ControllerConfig::default() };
        change(&mut config);
        let controller = Controller::open(config, node.clone(), events).unwrap();
        Self { controller, node, dir }
    }

    pub(crate) async fn deploy(&self, name: &str) -> std::sync::Arc<Deployed> {
        self.deploy_with(name, |_| {}).await
    }

    pub(crate) async fn deploy_with(
        &self,
        name: &str,
        change: impl FnOnce(&mut Deploy),
    ) -> std::sync::Arc<Deployed> {
        let source = self.dir.path().join("src");
        std::fs::create_dir_all(&source).unwrap();
        std::fs::write(source.join("app.py"), name).unwrap();
        let code = CodeSource::Directory(source);
        let mut deploy = Deploy::new(name.parse().unwrap(), "fake", "app.handler", code);
        change(&mut deploy);
        self.controller.deploy(deploy, DeployMode::Replace).await.unwrap()
    }

    pub(crate) async fn invoke(
        &self,
        name: &str,
        payload: &str,
    ) -> Result<medes_core::InvocationResult, crate::InvokeError> {
        let name = name.parse().unwrap();
        self.controller.invoke(&name, payload.to_owned().into(), Default::default()).await
    }

    /// The states of all sandboxes, sorted.
    pub(crate) fn states(&self) -> Vec<String> {
        let mut states: Vec<_> =
            self.controller.sandboxes().iter().map(|s| s.state.to_string()).collect();
        states.sort();
        states
    }

    /// Ends everything and checks that nothing remains and nothing was misused.
    pub(crate) async fn end(self) {
        self.controller.shutdown().await;
        assert_eq!(self.node.violations(), Vec::<String>::new());
        assert_eq!(self.node.count(), 0, "no sandbox is left");
    }
}
