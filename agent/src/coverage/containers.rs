//! Matches the container selectors of a target with the known facts about containers.

use globset::{GlobBuilder, GlobMatcher};

use super::GlobError;
use crate::{container::Container, policy::model::ContainerSelector};

/// The registry and the folder of images whose names do not contain them.
const REGISTRY: &str = "docker.io";
const FOLDER: &str = "library";

/// A compiled selector.
#[derive(Debug)]
pub(super) struct ContainerMatcher {
    name: Option<GlobMatcher>,
    image: Option<GlobMatcher>,
    id: Option<String>,
    runtime: Option<&'static str>,
}

impl ContainerMatcher {
    pub(super) fn new(selector: &ContainerSelector) -> Result<Self, GlobError> {
        let ContainerSelector { name, image, id, runtime } = selector;
        let glob = |text: &Option<String>| text.as_deref().map(glob).transpose();
        Ok(Self { name: glob(name)?, image: glob(image)?, id: id.clone(), runtime: *runtime })
    }

    /// Returns whether a container matches. A field that is unknown for the container matches nothing.
    pub(super) fn is_match(&self, container: &Container) -> bool {
        let Self { name, image, id, runtime } = self;
        let any = |glob: &Option<GlobMatcher>, words: Vec<String>| {
            glob.as_ref().is_none_or(|glob| words.iter().any(|word| glob.is_match(word)))
        };
        any(name, container.name.as_deref().map(names).unwrap_or_default())
            && any(image, container.image.as_deref().map(images).unwrap_or_default())
            && id.as_ref().is_none_or(|id| container.id.starts_with(id))
            && runtime.is_none_or(|runtime| container.runtime == runtime)
    }
}

/// Compiles a glob in which `*` matches any characters, including slashes: image names contain slashes and colons, and
/// their levels have no meaning.
fn glob(text: &str) -> Result<GlobMatcher, GlobError> {
    let glob = GlobBuilder::new(text).build();
    Ok(glob.map_err(|source| GlobError { pattern: text.to_owned(), source })?.compile_matcher())
}

/// Returns the names of a container: for `NAMESPACE/POD/CONTAINER`, also the last part.
fn names(name: &str) -> Vec<String> {
    let last = name.rsplit('/').next().filter(|last| *last != name);
    [Some(name), last].into_iter().flatten().map(str::to_owned).collect()
}

/// Returns the names of an image: as given; in full, `docker.io/library/nginx:latest`; and as Docker shows it,
/// `nginx:latest` (distribution/reference, normalize.go).
fn images(image: &str) -> Vec<String> {
    let mut words = vec![image.to_owned()];
    // The id of an image without a name.
    if image.starts_with("sha256:") || crate::container::is_id(image) {
        return words;
    }
    let (registry, path) = match image.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (first, rest),
        _ => (REGISTRY, image),
    };
    let short = path.strip_prefix(FOLDER).and_then(|path| path.strip_prefix('/')).unwrap_or(path);
    let has_tag = path.rsplit('/').next().is_some_and(|last| last.contains([':', '@']));
    let tag = if has_tag { "" } else { ":latest" };
    let is_hub = registry == REGISTRY || registry == "index.docker.io";
    if is_hub && !short.contains('/') {
        words.extend([format!("{REGISTRY}/{FOLDER}/{short}{tag}"), format!("{short}{tag}")]);
    } else if is_hub {
        words.extend([format!("{REGISTRY}/{path}{tag}"), format!("{path}{tag}")]);
    } else {
        words.push(format!("{registry}/{path}{tag}"));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::{DOCKER, PODMAN};

    const ID: &str = "4f7c2a9b01de53c86ae09b7d41f2c6580d3e9a17b4c85f6203ed91ab7c4f2e68";

    fn selector() -> ContainerSelector {
        ContainerSelector { name: None, image: None, id: None, runtime: None }
    }

    fn container() -> Container {
        Container {
            runtime: PODMAN,
            id: ID.to_owned(),
            pod: None,
            name: Some("web-1".to_owned()),
            image: Some("docker.io/library/nginx:1.27".to_owned()),
        }
    }

    fn matches(selector: &ContainerSelector, container: &Container) -> bool {
        ContainerMatcher::new(selector).unwrap().is_match(container)
    }

    #[test]
    fn all_fields_must_match() {
        let text = |text: &str| Some(text.to_owned());
        for (selector, expected) in [
            (ContainerSelector { name: text("web-*"), ..selector() }, true),
            (ContainerSelector { name: text("web"), ..selector() }, false),
            (ContainerSelector { id: text(&ID[..12]), ..selector() }, true),
            (ContainerSelector { id: text("0123456789ab"), ..selector() }, false),
            (ContainerSelector { runtime: Some(PODMAN), ..selector() }, true),
            (ContainerSelector { name: text("web-*"), runtime: Some(DOCKER), ..selector() }, false),
            (ContainerSelector { name: text("*"), image: text("*nginx*"), ..selector() }, true),
            (ContainerSelector { name: text("db"), image: text("*nginx*"), ..selector() }, false),
        ] {
            assert_eq!(matches(&selector, &container()), expected, "{selector}");
        }
    }

    #[test]
    fn image_matches_by_its_full_and_short_name() {
        for (image, glob, expected) in [
            ("docker.io/library/nginx:1.27", "docker.io/library/nginx:*", true),
            ("docker.io/library/nginx:1.27", "nginx:*", true),
            ("nginx", "docker.io/library/nginx:latest", true),
            ("nginx", "nginx", true),
            ("nginx:1.27", "docker.io/library/nginx:*", true),
            ("me/web:2", "docker.io/me/web:2", true),
            ("docker.io/me/web:2", "me/web:*", true),
            ("docker.io/me/web:2", "web:*", false),
            ("registry.example:5000/web", "registry.example:5000/web:latest", true),
            ("registry.example:5000/web@sha256:00", "registry.example:5000/web@*", true),
            ("localhost/web", "localhost/web:*", true),
            ("localhost/web", "web:*", false),
            ("quay.io/library/nginx:1", "nginx:*", false),
            ("sha256:4f7c", "docker.io*", false),
            ("docker.io/library/nginx:1.27", "docker.io/*:1.27", true),
        ] {
            let selector = ContainerSelector { image: Some(glob.to_owned()), ..selector() };
            let container = Container { image: Some(image.to_owned()), ..container() };
            assert_eq!(matches(&selector, &container), expected, "{image} by {glob}");
        }
    }

    #[test]
    fn container_of_a_pod_matches_by_its_full_name_and_by_its_last_part() {
        let container = Container { name: Some("shop/web-7d4b9/nginx".to_owned()), ..container() };
        for (glob, expected) in [("nginx", true), ("shop/web-*", true), ("shop/*/nginx", true), ("web-7d4b9", false)] {
            assert_eq!(matches(&ContainerSelector { name: Some(glob.to_owned()), ..selector() }, &container), expected);
        }
    }

    #[test]
    fn unknown_fields_of_a_container_match_nothing() {
        let container = Container { name: None, image: None, ..container() };
        let star = Some("*".to_owned());
        assert!(!matches(&ContainerSelector { name: star.clone(), ..selector() }, &container));
        assert!(!matches(&ContainerSelector { image: star, ..selector() }, &container));
        assert!(matches(&ContainerSelector { runtime: Some(PODMAN), ..selector() }, &container));
    }
}
