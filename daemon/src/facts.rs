//! What the decision may know of a job, collected from those who know it: models, workers, providers, rules.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::Routing;
use crate::engine::package::{OutputKind, Package, SeriesForm};
use crate::engine::{Model, Pool, Registry, meter};
use crate::job::{Code, Fault, Job, Privacy, TASKS};
use crate::route::{Device, Facts, Local, PrivacyRules};
use crate::uplink::{self, Question, Shape, Uplink};

/// Tokens that a label and its confidence take, with room to spare.
const ANSWER_TOKENS: u32 = 256;
/// Tokens of a generated text where the job does not say.
const TEXT_TOKENS: u32 = 1024;

/// Longest side of a picture that is sent up, in pixels; a model that sees less needs less.
const PICTURE_SIDE: (u32, u32) = (256, 1024);
/// Pixels sent up for each pixel that the local model sees.
const PICTURE_SCALE: u32 = 8;

/// Who is asked for facts.
#[derive(Clone, Copy)]
pub struct Sources<'a> {
    /// Models that are active.
    pub registry: &'a Registry,
    /// Who runs them.
    pub pool: &'a Pool,
    /// Closed models.
    pub uplink: &'a Uplink,
    /// Rules.
    pub routing: &'a Routing,
}

impl<'a> Sources<'a> {
    /// What the decision may know of a job.
    pub fn about(&self, job: &Job, models: &[&Arc<Model>], question: Result<&Question<'_>, &String>) -> Facts {
        let rule = self.routing.task.get(&job.task).copied().unwrap_or_default();
        Facts {
            device: self.device(job, models),
            offers: self.uplink.offers(question.ok()),
            question: question.map(|_| ()).map_err(String::clone),
            prefer: rule.prefer,
            privacy: PrivacyRules {
                node: self.routing.privacy,
                task: rule.privacy.unwrap_or(Privacy::Cloud),
                job: job.wishes.privacy,
            },
            max_cost_usd: job.wishes.max_cost_usd,
            left: job.wishes.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())),
        }
    }

    /// The models that may be asked: those of the task, or the one that the job names; of each the newest, if
    /// the job does not say which.
    pub fn candidates(&self, job: &Job) -> Vec<&'a Arc<Model>> {
        let wanted = job.wishes.model.as_deref();
        let mut models: Vec<&'a Arc<Model>> = Vec::new();
        for model in self.registry.models() {
            let known = models.last().is_some_and(|last| last.package.manifest.name == model.package.manifest.name);
            if model.package.manifest.task == job.task && wanted.is_none_or(|name| model.package.is(name)) && !known {
                models.push(model);
            }
        }
        models
    }

    /// The package that would serve the job if it were not too large for this device.
    fn too_large(&self, job: &Job) -> Option<&'a Package> {
        self.registry.find_too_large(&job.task, job.wishes.model.as_deref()).map(|(package, _)| package)
    }

    fn device(&self, job: &Job, models: &[&Arc<Model>]) -> Device {
        let (task, wanted) = (&job.task, job.wishes.model.as_deref());
        let local = |model: &&Arc<Model>| Local {
            id: model.id(),
            fit: model.check(&job.input),
            wait: self.pool.wait(),
            run: model.estimate(&job.input),
        };
        let mut locals: Vec<Local> = models.iter().map(local).collect();
        if let Some((package, figures)) = self.registry.find_too_large(task, wanted) {
            let fault = Fault::new(Code::AboveCapability, format!("{}: {figures}", package.id()));
            let fit = Err(fault.field("models.memory_mib").limit(meter::mib(figures.limit)));
            locals.push(Local { id: package.id(), fit, wait: Duration::ZERO, run: Duration::ZERO });
        }
        if !locals.is_empty() {
            return Device::Models(locals);
        }
        match wanted {
            Some(wanted) => Device::Wrong(
                Fault::new(Code::UnknownModel, format!("no active model `{wanted}` serves {task}"))
                    .field("model")
                    .limit(self.models_of(task)),
            ),
            None if TASKS.contains(&task.as_str()) => Device::Above(
                Fault::new(Code::AboveCapability, format!("no model on this device serves {task}")).field("task"),
            ),
            None => Device::Wrong(
                Fault::new(Code::UnknownTask, format!("`{task}` is not a task of this node"))
                    .field("task")
                    .limit(self.registry.tasks()),
            ),
        }
    }

    fn models_of(&self, task: &str) -> Vec<String> {
        let of_task = self.registry.models().iter().filter(|model| model.package.manifest.task == task);
        of_task.map(|model| model.id()).collect()
    }

    /// What a closed model would be asked in the place of `models`.
    ///
    /// # Errors
    /// In words, why it cannot be asked.
    pub fn question<'q>(&self, job: &'q Job, models: &[&'q Arc<Model>]) -> Result<Question<'q>, String>
    where
        'a: 'q,
    {
        let package = models.first().map(|model| &model.package).or_else(|| self.too_large(job));
        let own = match package {
            Some(package) => match &package.manifest.uplink {
                Some(uplink) => Some(uplink.instruction.as_str()),
                None => return Err(format!("{} has no [uplink]: its task stays on the device", package.id())),
            },
            None => match self.registry.refused_local(&job.task) {
                Some(dir) => {
                    let (dir, task) = (dir.display(), &job.task);
                    return Err(format!("{dir} has no [uplink] and is refused: {task} stays on the device"));
                }
                None => None,
            },
        };
        let text = |key: &str| job.wishes.params.get(key).and_then(|value| value.as_str());
        let labels = || -> Vec<String> {
            let asked = job.wishes.params.get("labels").and_then(|labels| serde_json::from_value(labels.clone()).ok());
            asked.or_else(|| package.map(|package| package.labels.clone())).unwrap_or_default()
        };
        let (shape, instruction, max_output_tokens) = match job.task.as_str() {
            "text.generate" => {
                let tokens = job.wishes.params.get("max_tokens").and_then(serde_json::Value::as_u64);
                let instruction = text("prompt").or(own).unwrap_or("Answer what the text asks.");
                (Shape::Text, instruction, tokens.map_or(TEXT_TOKENS, |tokens| tokens.clamp(1, 32_768) as u32))
            }
            "series.anomaly" => {
                let threshold = package.and_then(|package| package.manifest.output.threshold).unwrap_or(1.0);
                let instruction = own.or(text("prompt")).unwrap_or("Say whether this series of samples is anomalous.");
                (Shape::Anomaly { threshold }, instruction, ANSWER_TOKENS)
            }
            task => {
                let classes = task.ends_with(".classify")
                    || package.is_some_and(|package| package.manifest.output.kind == OutputKind::Classes);
                let labels = labels();
                if !classes {
                    return Err(format!("a closed model cannot be asked for {task} by this version"));
                }
                if labels.is_empty() {
                    return Err("a closed model needs params.labels to choose from".to_owned());
                }
                let instruction = own.or(text("prompt")).unwrap_or("Choose the label that fits best.");
                (Shape::Classes { labels }, instruction, ANSWER_TOKENS)
            }
        };
        let sees = package.and_then(|package| package.manifest.input.size).map(|[width, height]| width.max(height));
        let picture_side = sees
            .map_or(PICTURE_SIDE.1, |side| side.saturating_mul(PICTURE_SCALE).clamp(PICTURE_SIDE.0, PICTURE_SIDE.1));
        let form = package.and_then(|package| package.manifest.uplink.as_ref()?.series);
        let plot = form.map(|form| form == SeriesForm::Plot);
        let (task, input) = (job.task.as_str(), &job.input);
        let question = Question { task, instruction, input, shape, max_output_tokens, picture_side, plot };
        uplink::sendable(&question)?;
        Ok(question)
    }
}
