//! Function configurations as Lambda's clients write and read them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use medes_controller::{Controller, Deployed};
use medes_core::{FunctionId, FunctionSpec, RequestId};
use medes_node::NodeApi;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::LambdaError;
use super::name::{LATEST, arn};

/// Labels in which this dialect keeps what the platform has no use for.
const ROLE: &str = "lambda.role";
const LAYERS: &str = "lambda.layers";
const TAGS: &str = "lambda.tags";

/// What CreateFunction and UpdateFunctionConfiguration have in common.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Settings {
    pub(super) runtime: Option<String>,
    role: Option<String>,
    pub(super) handler: Option<String>,
    pub(super) description: Option<String>,
    timeout: Option<u64>,
    memory_size: Option<u64>,
    environment: Option<Environment>,
    layers: Option<Vec<String>>,
    tags: Option<BTreeMap<String, String>>,
    pub(super) revision_id: Option<String>,
    architectures: Option<Vec<String>>,
    package_type: Option<String>,
    publish: Option<bool>,
    ephemeral_storage: Option<Value>,
    file_system_configs: Option<Vec<Value>>,
    image_config: Option<Value>,
    snap_start: Option<Value>,
    vpc_config: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Environment {
    #[serde(default)]
    variables: BTreeMap<String, String>,
}

impl Settings {
    /// Refuses what does not exist here and would make a difference to the function.
    pub(super) fn check(&self) -> Result<(), LambdaError> {
        let unsupported =
            |what: &str| Err(LambdaError::invalid(format!("{what} is not supported")));
        if self.publish == Some(true) {
            return unsupported("Publish: there are no versions, only $LATEST; it");
        }
        if self.package_type.as_deref().is_some_and(|p| p != "Zip") {
            return unsupported("PackageType other than Zip");
        }
        let given = |v: &Option<Value>, key: &str| {
            v.as_ref().is_some_and(|v| v[key].as_array().is_some_and(|a| !a.is_empty()))
        };
        if self.file_system_configs.as_ref().is_some_and(|f| !f.is_empty()) {
            return unsupported("FileSystemConfigs");
        }
        if given(&self.vpc_config, "SubnetIds") {
            return unsupported("VpcConfig");
        }
        if self.image_config.as_ref().is_some_and(|c| !c.is_null()) {
            return unsupported("ImageConfig");
        }
        if self.snap_start.as_ref().is_some_and(|s| s["ApplyOn"] == "PublishedVersions") {
            return unsupported("SnapStart");
        }
        if self.ephemeral_storage.as_ref().is_some_and(|s| s["Size"].as_u64() > Some(512)) {
            return unsupported("EphemeralStorage above 512 MB");
        }
        check_architectures(self.architectures.as_deref())
    }

    pub(super) fn timeout_ms(&self) -> Result<Option<u64>, LambdaError> {
        ranged(self.timeout, 1, 5400, "timeout").map(|t| t.map(|t| t * 1000))
    }

    pub(super) fn memory_mib(&self) -> Result<Option<u32>, LambdaError> {
        ranged(self.memory_size, 128, 32_768, "memorySize").map(|m| m.map(|m| m as u32))
    }

    pub(super) fn variables(&self) -> Result<Option<BTreeMap<String, String>>, LambdaError> {
        let Some(environment) = &self.environment else { return Ok(None) };
        let reserved: Vec<&str> = environment
            .variables
            .keys()
            .map(String::as_str)
            .filter(|key| RESERVED.contains(key))
            .collect();
        if !reserved.is_empty() {
            return Err(LambdaError::invalid(format!(
                "Lambda was unable to configure your environment variables because the \
                 environment variables you have provided contains reserved keys that are \
                 currently not supported for modification. Reserved keys used in this request: {}",
                reserved.join(", ")
            )));
        }
        Ok(Some(environment.variables.clone()))
    }

    /// The directories or zip files of the layers, which the platform's configuration names.
    pub(super) fn layer_paths(
        &self,
        known: &BTreeMap<String, PathBuf>,
    ) -> Result<Option<Vec<PathBuf>>, LambdaError> {
        let Some(layers) = &self.layers else { return Ok(None) };
        let path = |layer: &String| {
            // arn:aws:lambda:region:account:layer:name:version
            let name = layer.split(':').skip_while(|p| *p != "layer").nth(1).unwrap_or(layer);
            known.get(name).cloned().ok_or_else(|| {
                LambdaError::invalid(format!(
                    "Layer version {layer} does not exist. Layers are directories or zip files \
                     that the platform's configuration names; {name:?} is none of them"
                ))
            })
        };
        layers.iter().map(path).collect::<Result<_, _>>().map(Some)
    }

    /// What is only kept to be given back.
    pub(super) fn labels(&self) -> BTreeMap<String, String> {
        let mut labels = BTreeMap::new();
        if let Some(role) = &self.role {
            labels.insert(ROLE.to_owned(), role.clone());
        }
        if let Some(layers) = &self.layers {
            labels.insert(LAYERS.to_owned(), layers.join(" "));
        }
        if let Some(tags) = &self.tags {
            labels.insert(TAGS.to_owned(), json!(tags).to_string());
        }
        labels
    }
}

/// The variables that the runtime's contract sets.
const RESERVED: &[&str] = &[
    "_HANDLER",
    "_X_AMZN_TRACE_ID",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
    "AWS_EXECUTION_ENV",
    "AWS_LAMBDA_FUNCTION_NAME",
    "AWS_LAMBDA_FUNCTION_MEMORY_SIZE",
    "AWS_LAMBDA_FUNCTION_VERSION",
    "AWS_LAMBDA_INITIALIZATION_TYPE",
    "AWS_LAMBDA_LOG_GROUP_NAME",
    "AWS_LAMBDA_LOG_STREAM_NAME",
    "AWS_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_LAMBDA_RUNTIME_API",
    "LAMBDA_TASK_ROOT",
    "LAMBDA_RUNTIME_DIR",
];

fn ranged(
    value: Option<u64>,
    least: u64,
    most: u64,
    field: &str,
) -> Result<Option<u64>, LambdaError> {
    match value {
        Some(v) if v < least => Err(LambdaError::validation(
            &v.to_string(),
            field,
            &format!("Member must have value greater than or equal to {least}"),
        )),
        Some(v) if v > most => Err(LambdaError::validation(
            &v.to_string(),
            field,
            &format!("Member must have value less than or equal to {most}"),
        )),
        other => Ok(other),
    }
}

fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "x86_64" }
}

pub(super) fn check_architectures(wanted: Option<&[String]>) -> Result<(), LambdaError> {
    match wanted {
        Some([one]) if one == architecture() => Ok(()),
        None | Some([]) => Ok(()),
        Some(_) => Err(LambdaError::invalid(format!(
            "Architectures: this machine has {} only",
            architecture()
        ))),
    }
}

/// The version that a revision names.
pub(super) fn version_of(revision: &str) -> Result<FunctionId, LambdaError> {
    let id: RequestId = revision.parse().map_err(|_| LambdaError::stale())?;
    u64::try_from(id.0).map(FunctionId).map_err(|_| LambdaError::stale())
}

/// A function as Lambda shows it.
pub(super) fn describe(deployed: &Deployed) -> Value {
    let Deployed { spec, labels, .. } = deployed;
    let role = labels.get(ROLE).map_or("arn:aws:iam::000000000000:role/none", String::as_str);
    let mut shown = json!({
        "FunctionName": spec.name,
        "FunctionArn": arn(spec.name.as_str()),
        "Runtime": spec.runtime,
        "Role": role,
        "Handler": spec.handler,
        "CodeSize": spec.code_size,
        "Description": spec.description,
        "Timeout": spec.timeout_ms.div_ceil(1000),
        "MemorySize": spec.memory_mib,
        "LastModified": last_modified(spec),
        "CodeSha256": spec.code_sha256,
        "Version": LATEST,
        "TracingConfig": { "Mode": "PassThrough" },
        "RevisionId": RequestId(u128::from(spec.id.0)).to_string(),
        "State": "Active",
        "LastUpdateStatus": "Successful",
        "PackageType": "Zip",
        "Architectures": [architecture()],
        "EphemeralStorage": { "Size": 512 },
        "SnapStart": { "ApplyOn": "None", "OptimizationStatus": "Off" },
        "LoggingConfig": {
            "LogFormat": "Text",
            "LogGroup": format!("/aws/lambda/{}", spec.name),
        },
    });
    if !spec.environment.is_empty() {
        shown["Environment"] = json!({ "Variables": spec.environment });
    }
    if let Some(layers) = labels.get(LAYERS).filter(|l| !l.is_empty()) {
        let list: Vec<Value> =
            layers.split(' ').map(|arn| json!({ "Arn": arn, "CodeSize": 0 })).collect();
        shown["Layers"] = json!(list);
    }
    shown
}

/// A function's tags.
pub(super) fn tags(deployed: &Deployed) -> Value {
    let text = deployed.labels.get(TAGS).map_or("{}", String::as_str);
    serde_json::from_str(text).unwrap_or_else(|_| json!({}))
}

/// The layers that the platform's configuration names.
pub(super) fn known_layers<N: NodeApi>(controller: &Controller<N>) -> &BTreeMap<String, PathBuf> {
    &controller.config().layers
}

fn last_modified(spec: &FunctionSpec) -> String {
    let moment = i64::try_from(spec.deployed_at_ms).unwrap_or(i64::MAX);
    jiff::Timestamp::from_millisecond(moment)
        .unwrap_or_default()
        .strftime("%Y-%m-%dT%H:%M:%S%.3f+0000")
        .to_string()
}
