//! The operator's hand on the policy: which one decides, what is wanted of it for single functions,
//! and why it decides as it does.

use std::sync::Arc;

use medes_core::FunctionName;
use medes_node::NodeApi;
use medes_policy::{Explanation, FunctionSettings, PolicySettings};
use serde::{Deserialize, Serialize};

use crate::controller::{Controller, Inner};
use crate::error::{DeployError, HandError};
use crate::functions::{blocking, to_its_end};

/// Where the policy in force was set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PolicyOrigin {
    /// In the configuration.
    Configuration,
    /// Live, which holds over the configuration until it is reset.
    Live,
}

/// The policy in force.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PolicyView {
    /// Which one, and its figures.
    pub policy: PolicySettings,
    /// Where that was set.
    pub origin: PolicyOrigin,
    /// What the configuration says.
    pub configured: PolicySettings,
    /// Functions for which something else was set.
    pub functions: Vec<FunctionPolicy>,
}

/// What was set for one function.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct FunctionPolicy {
    /// The function.
    pub function: FunctionName,
    /// What holds for it alone; where nothing is set, the policy's own value does.
    pub settings: FunctionSettings,
}

/// Why a function's sandboxes are treated as they are.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PolicyExplanation {
    /// The function.
    pub function: FunctionName,
    /// The policy in force.
    pub policy: PolicySettings,
    /// What was set for the function alone.
    pub settings: FunctionSettings,
    /// What the policy decided, and from what.
    #[serde(flatten)]
    pub explanation: Explanation,
}

impl<N: NodeApi> Controller<N> {
    /// The policy in force.
    #[must_use]
    pub fn policy(&self) -> PolicyView {
        let inner = &self.inner;
        let (policy, deployed) = inner.with(|t, _| (t.policy_settings(), t.functions()));
        let set = |d: &Arc<crate::store::Deployed>| {
            (d.settings != FunctionSettings::default())
                .then(|| FunctionPolicy { function: d.spec.name.clone(), settings: d.settings })
        };
        let live = inner.live_policy.load(std::sync::atomic::Ordering::Relaxed);
        PolicyView {
            policy,
            origin: if live { PolicyOrigin::Live } else { PolicyOrigin::Configuration },
            configured: inner.config.policy,
            functions: deployed.iter().filter_map(set).collect(),
        }
    }

    /// Has another policy decide from now on, over restarts too; `None` for that of the
    /// configuration.
    ///
    /// # Errors
    /// If a setting makes no sense, or the state can't be written.
    pub async fn set_policy(&self, settings: Option<PolicySettings>) -> Result<(), DeployError> {
        let inner = self.inner.clone();
        to_its_end(async move { inner.set_policy(settings).await }).await
    }

    /// Changes what is wanted of the policy for one function alone. Its sandboxes stay.
    ///
    /// # Errors
    /// If there is no such function, a setting makes no sense, or the state can't be written.
    pub async fn set_function_policy(
        &self,
        name: &FunctionName,
        settings: FunctionSettings,
    ) -> Result<(), DeployError> {
        let (inner, name) = (self.inner.clone(), name.clone());
        to_its_end(async move { inner.set_function_policy(&name, settings).await }).await
    }

    /// What was set for one function.
    #[must_use]
    pub fn function_settings(&self, name: &FunctionName) -> Option<FunctionSettings> {
        self.inner.with(|t, _| t.function(name).map(|d| d.settings))
    }

    /// What the policy decided for a function, from what numbers, and what another latency target
    /// would bring.
    ///
    /// # Errors
    /// If there is no such function.
    pub fn explain(&self, name: &FunctionName) -> Result<PolicyExplanation, HandError> {
        let found = self.inner.with_memory(|t, now| {
            let explanation = t.explain(now, name)?;
            let settings = t.function(name)?.settings;
            Some(PolicyExplanation {
                function: name.clone(),
                policy: t.policy_settings(),
                settings,
                explanation,
            })
        });
        found.ok_or_else(|| HandError::NoSuchFunction(name.clone()))
    }
}

impl<N: NodeApi> Inner<N> {
    async fn set_policy(
        self: &Arc<Self>,
        settings: Option<PolicySettings>,
    ) -> Result<(), DeployError> {
        if let Some(settings) = &settings {
            settings.check()?;
        }
        let _changing = self.changing.lock().await;
        let store = self.store.clone();
        blocking(move || store.set_policy(settings.as_ref())).await?;
        let in_force = settings.unwrap_or(self.config.policy);
        self.live_policy.store(settings.is_some(), std::sync::atomic::Ordering::Relaxed);
        self.with_memory(|t, now| t.set_policy(now, in_force));
        tracing::info!(policy = %in_force.name, live = settings.is_some(), "policy set");
        Ok(())
    }

    async fn set_function_policy(
        self: &Arc<Self>,
        name: &FunctionName,
        settings: FunctionSettings,
    ) -> Result<(), DeployError> {
        settings.check()?;
        let _changing = self.changing.lock().await;
        let old = self
            .with(|t, _| t.function(name))
            .ok_or_else(|| DeployError::NoSuchFunction(name.clone()))?;
        let mut deployed = (*old).clone();
        deployed.settings = settings;
        let deployed = Arc::new(deployed);
        let (store, record) = (self.store.clone(), deployed.clone());
        blocking(move || store.put(&record)).await?;
        self.with_memory(|t, now| t.set_function_settings(now, name, deployed));
        tracing::info!(function = %name, "policy settings changed");
        Ok(())
    }
}
