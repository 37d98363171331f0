//! Functions: create, show, list, update, delete.

use std::collections::BTreeMap;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use medes_controller::{Change, CodeSource, Deploy, DeployError, DeployMode};
use medes_node::NodeApi;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::Api;
use super::configuration::{
    Settings, check_architectures, describe, known_layers, tags, version_of,
};
use super::error::LambdaError;
use super::name::parse;
use crate::body::{self, BodyError};
use crate::native::deploy_limit;

type Parameters = Query<BTreeMap<String, String>>;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Create {
    function_name: String,
    code: Code,
    #[serde(flatten)]
    settings: Settings,
}

/// The code, in CreateFunction below `Code`, in UpdateFunctionCode at the top.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Code {
    zip_file: Option<String>,
    s3_bucket: Option<String>,
    image_uri: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct UpdateCode {
    #[serde(flatten)]
    code: Code,
    revision_id: Option<String>,
    publish: Option<bool>,
    dry_run: Option<bool>,
    architectures: Option<Vec<String>>,
}

impl Code {
    fn source(self) -> Result<CodeSource, LambdaError> {
        if self.s3_bucket.is_some() || self.image_uri.is_some() {
            let message = "Code in S3 or in an image is not supported: send it as ZipFile";
            return Err(LambdaError::invalid(message));
        }
        let text = self
            .zip_file
            .ok_or_else(|| LambdaError::invalid("Please provide a source for function code."))?;
        let bytes = STANDARD
            .decode(text)
            .map_err(|e| LambdaError::serialization(format!("ZipFile is not Base64: {e}")))?;
        Ok(CodeSource::Zip(bytes))
    }
}

async fn read<T: DeserializeOwned>(
    body: Body,
    max_code: u64,
    operation: &str,
) -> Result<T, LambdaError> {
    let limit = deploy_limit(max_code);
    let bytes = body::read(body, limit).await.map_err(|e| match e {
        BodyError::TooLong => LambdaError::too_large(
            "RequestEntityTooLargeException",
            format!("Request must be smaller than {limit} bytes for the {operation} operation"),
        ),
        BodyError::Broken(why) => LambdaError::serialization(why),
    })?;
    serde_json::from_slice(&bytes).map_err(|e| LambdaError::serialization(e.to_string()))
}

pub(super) async fn create<N: NodeApi>(
    State(api): State<Api<N>>,
    body: Body,
) -> Result<(StatusCode, Json<Value>), LambdaError> {
    let config = api.controller.config();
    let wanted: Create = read(body, config.max_code, "CreateFunction").await?;
    let name = parse(&wanted.function_name, None)?;
    let settings = wanted.settings;
    settings.check()?;
    let code = wanted.code.source()?;
    let (Some(runtime), Some(handler)) = (&settings.runtime, &settings.handler) else {
        return Err(LambdaError::invalid(
            "Runtime and Handler are mandatory parameters for functions created with deployment \
             packages.",
        ));
    };
    let deploy = Deploy {
        layers: settings.layer_paths(known_layers(&api.controller))?.unwrap_or_default(),
        environment: settings.variables()?.unwrap_or_default(),
        memory_mib: settings.memory_mib()?.unwrap_or(128),
        timeout_ms: settings.timeout_ms()?.unwrap_or(3_000),
        description: settings.description.clone().unwrap_or_default(),
        labels: settings.labels(),
        ..Deploy::new(name, runtime, handler, code)
    };
    let deployed = api.controller.deploy(deploy, DeployMode::Create).await?;
    Ok((StatusCode::CREATED, Json(describe(&deployed))))
}

pub(super) async fn get<N: NodeApi>(
    State(api): State<Api<N>>,
    Path(name): Path<String>,
    Query(query): Parameters,
) -> Result<Json<Value>, LambdaError> {
    let name = parse(&name, query.get("Qualifier").map(String::as_str))?;
    let deployed =
        api.controller.deployed(&name).ok_or_else(|| LambdaError::not_found(name.as_str()))?;
    Ok(Json(json!({
        "Configuration": describe(&deployed),
        // The archive itself is not kept, so there is no address to fetch it from.
        "Code": { "RepositoryType": "Medes" },
        "Tags": tags(&deployed),
    })))
}

pub(super) async fn get_configuration<N: NodeApi>(
    State(api): State<Api<N>>,
    Path(name): Path<String>,
    Query(query): Parameters,
) -> Result<Json<Value>, LambdaError> {
    let name = parse(&name, query.get("Qualifier").map(String::as_str))?;
    let deployed =
        api.controller.deployed(&name).ok_or_else(|| LambdaError::not_found(name.as_str()))?;
    Ok(Json(describe(&deployed)))
}

pub(super) async fn list<N: NodeApi>(
    State(api): State<Api<N>>,
    Query(query): Parameters,
) -> Result<Json<Value>, LambdaError> {
    let most = match query.get("MaxItems").map(|n| n.parse::<usize>()) {
        None => 50,
        Some(Ok(n)) if (1..=10_000).contains(&n) => n.min(50),
        Some(_) => {
            let shown = query.get("MaxItems").map_or("", String::as_str);
            return Err(LambdaError::validation(shown, "maxItems", "Member must be 1 to 10000"));
        }
    };
    let after = query.get("Marker").map_or("", String::as_str);
    let mut found: Vec<_> = api
        .controller
        .all_deployed()
        .into_iter()
        .filter(|d| d.spec.name.as_str() > after)
        .collect();
    let more = found.len() > most;
    found.truncate(most);
    let next = found.last().filter(|_| more).map(|d| d.spec.name.clone());
    let functions: Vec<Value> = found.iter().map(|d| describe(d)).collect();
    Ok(Json(json!({ "Functions": functions, "NextMarker": next })))
}

pub(super) async fn update_code<N: NodeApi>(
    State(api): State<Api<N>>,
    Path(name): Path<String>,
    body: Body,
) -> Result<Json<Value>, LambdaError> {
    let name = parse(&name, None)?;
    let max_code = api.controller.config().max_code;
    let wanted: UpdateCode = read(body, max_code, "UpdateFunctionCode").await?;
    if wanted.publish == Some(true) || wanted.dry_run == Some(true) {
        return Err(LambdaError::invalid("Publish and DryRun are not supported"));
    }
    check_architectures(wanted.architectures.as_deref())?;
    let change = Change {
        expected: wanted.revision_id.as_deref().map(version_of).transpose()?,
        code: Some(wanted.code.source()?),
        ..Change::default()
    };
    Ok(Json(describe(&*api.controller.change(&name, change).await?)))
}

pub(super) async fn update_configuration<N: NodeApi>(
    State(api): State<Api<N>>,
    Path(name): Path<String>,
    body: Body,
) -> Result<Json<Value>, LambdaError> {
    let name = parse(&name, None)?;
    let max_code = api.controller.config().max_code;
    let settings: Settings = read(body, max_code, "UpdateFunctionConfiguration").await?;
    settings.check()?;
    let change = Change {
        expected: settings.revision_id.as_deref().map(version_of).transpose()?,
        code: None,
        runtime: settings.runtime.clone(),
        handler: settings.handler.clone(),
        layers: settings.layer_paths(known_layers(&api.controller))?,
        environment: settings.variables()?,
        memory_mib: settings.memory_mib()?,
        timeout_ms: settings.timeout_ms()?,
        description: settings.description.clone(),
        labels: settings.labels(),
    };
    Ok(Json(describe(&*api.controller.change(&name, change).await?)))
}

pub(super) async fn delete<N: NodeApi>(
    State(api): State<Api<N>>,
    Path(name): Path<String>,
    Query(query): Parameters,
) -> Result<StatusCode, LambdaError> {
    let name = parse(&name, query.get("Qualifier").map(String::as_str))?;
    api.controller.remove(&name).await.map_err(|e: DeployError| LambdaError::from(e))?;
    Ok(StatusCode::NO_CONTENT)
}
