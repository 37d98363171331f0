//! Names of functions as clients of Lambda write them.

use medes_core::FunctionName;

use super::error::LambdaError;

/// The region that everything claims to be in.
const REGION: &str = "us-east-1";
/// The account that everything claims to belong to.
const ACCOUNT: &str = "000000000000";
/// The only version that there is.
pub(super) const LATEST: &str = "$LATEST";

/// The ARN of a function.
pub(super) fn arn(name: &str) -> String {
    format!("arn:aws:lambda:{REGION}:{ACCOUNT}:function:{name}")
}

/// Reads a name: `name`, `name:$LATEST`, `123456789012:function:name`, `function:name` or a whole
/// ARN, whatever its region and account. `qualifier` is the query parameter of that name.
pub(super) fn parse(text: &str, qualifier: Option<&str>) -> Result<FunctionName, LambdaError> {
    let parts: Vec<&str> = text.split(':').collect();
    let rest = match parts.as_slice() {
        ["arn", _, "lambda", _, _, "function", rest @ ..]
        | [_, "function", rest @ ..]
        | ["function", rest @ ..] => rest,
        rest => rest,
    };
    let (name, version) = match rest {
        [name] => (*name, qualifier),
        [name, version] => (*name, Some(*version)),
        _ => return Err(bad(text)),
    };
    let name: FunctionName = name.parse().map_err(|_| bad(text))?;
    match version {
        None | Some(LATEST | "") => Ok(name),
        // There are no versions or aliases.
        Some(other) => Err(LambdaError::not_found(&format!("{name}:{other}"))),
    }
}

fn bad(text: &str) -> LambdaError {
    let shown: String = text.chars().take(200).collect();
    LambdaError::validation(
        &shown,
        "functionName",
        "Member must satisfy regular expression pattern: \
         (arn:(aws[a-zA-Z-]*)?:lambda:)?([a-z]{2}((-gov)|(-iso(b?)))?-[a-z]+-\\d{1}:)?(\\d{12}:)?\
         (function:)?([a-zA-Z0-9-_]+)(:(\\$LATEST|[a-zA-Z0-9-_]+))?",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_write_a_name_is_understood() {
        for text in [
            "f",
            "f:$LATEST",
            "function:f",
            "123456789012:function:f",
            "123456789012:function:f:$LATEST",
            "arn:aws:lambda:eu-central-1:123456789012:function:f",
            "arn:aws:lambda:us-east-1:000000000000:function:f:$LATEST",
        ] {
            assert_eq!(parse(text, None).unwrap().as_str(), "f", "{text}");
        }
        assert_eq!(parse("f", Some("$LATEST")).unwrap().as_str(), "f");
        for (text, qualifier) in [("f:prod", None), ("f", Some("1")), ("a:b:c", None), ("ä", None)]
        {
            assert!(parse(text, qualifier).is_err(), "{text}");
        }
        assert_eq!(parse(&arn("f"), None).unwrap().as_str(), "f");
    }
}
