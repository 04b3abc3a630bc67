//! The first example, told in one page: tables and a week of real flights by SQL, two plugins uploaded, a live query
//! through both, then a day of departures replayed while the events arrive.
//!
//! `sh examples/run.sh` starts the server and this program, and hands down what it needs by environment:
//! `TIDEGATE_URL`, `TIDEGATE_ADMIN_TOKEN`, `TIDEGATE_TOKEN_FILE` (for the printed curl lines), `TIDEGATE_PLUGINS` (a
//! folder), `SPEED` (minutes of the day per second), `MINUTES` (what counts as late), `ONCE` (unattended).
//!
//! [`data`] has the committed slice, [`day`] what happens when on the replayed day, [`api`] speaks HTTP, [`board`]
//! folds and prints the events, [`check`] computes natively what the fold has to be.

mod api;
mod board;
mod check;
mod data;
mod day;

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;

use crate::api::Api;
use crate::board::Board;
use crate::day::Day;

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// What the board shows: the departures of one airport that have not landed, of the replayed day. The plugins see
/// whole rows of the table; the transform gives them columns of its own.
const LIVE_SQL: &str = "SELECT * FROM flights \
     WHERE origin = 'JFK' AND status <> 'arrived' AND sched_dep >= '2013-03-08T05:00:00Z'";

struct Settings {
    url: String,
    token: String,
    token_file: String,
    plugins: String,
    /// Minutes of the replayed day per second; `None`: as fast as the server takes it.
    speed: Option<f64>,
    minutes: i64,
}

impl Settings {
    fn from_env() -> Result<Self> {
        let text = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let need = |name: &str| text(name).ok_or_else(|| format!("{name} is not set; start this by examples/run.sh"));
        let number = |name: &str, default: f64| match text(name) {
            None => Ok(default),
            Some(value) => match value.parse::<f64>() {
                Ok(number) if number > 0.0 && number <= 1e9 => Ok(number),
                _ => Err(format!("{name} is {value:?}; it has to be a number above 0")),
            },
        };
        let once = text("ONCE").is_some_and(|value| value != "0");
        let speed = number("SPEED", 20.0)?;
        Ok(Settings {
            url: need("TIDEGATE_URL")?,
            token: need("TIDEGATE_ADMIN_TOKEN")?,
            token_file: need("TIDEGATE_TOKEN_FILE")?,
            plugins: need("TIDEGATE_PLUGINS")?,
            speed: (!once).then_some(speed),
            minutes: number("MINUTES", 15.0)? as i64,
        })
    }

    fn pipeline(&self) -> [String; 2] {
        [format!("late:{}", json!({"minutes": self.minutes})), "local_units".to_owned()]
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let outcome = match Settings::from_env() {
        Ok(settings) => run(&settings).await,
        Err(error) => Err(error),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(settings: &Settings) -> Result<()> {
    let api = Api::new(&settings.url, &settings.token)?;
    let airlines = data::load(&api).await?;
    for name in ["late", "local_units"] {
        let module = std::fs::read(format!("{}/{name}.wasm", settings.plugins))
            .map_err(|error| format!("cannot read the plugin {name}.wasm in {}: {error}", settings.plugins))?;
        println!("plugin   {}", api.put_plugin(name, module).await?);
    }

    let day = Day::from_slice()?;
    let pipeline = settings.pipeline();
    println!("live     {LIVE_SQL}\n         through {} and {}", pipeline[0], pipeline[1]);
    let board = Board::open(&api, LIVE_SQL, &pipeline, airlines, settings.speed.is_some()).await?;

    match settings.speed {
        Some(speed) => {
            watch(&api, &day, speed).await?;
            println!("\nThe day is over: {}.", board.counts());
            print_curl_lines(settings, &pipeline);
            Err(board.ended().await.into())
        }
        None => {
            check::replay(&api, &day, &board, settings.minutes).await?;
            println!("checked  {}; at every stop the events folded to what the table says", board.counts());
            Ok(())
        }
    }
}

/// Replays the day at `speed` minutes a second.
async fn watch(api: &Api, day: &Day, speed: f64) -> Result<()> {
    let (first, start) = (day.first_minute(), tokio::time::Instant::now());
    let mut hour = i64::MIN;
    for (minute, steps) in day.minutes() {
        let due = Duration::from_secs_f64((minute - first) as f64 / speed);
        tokio::time::sleep_until(start + due).await;
        if hour != minute.div_euclid(60) {
            hour = minute.div_euclid(60);
            println!("──────── {:02}:00 in New York ────────", hour.rem_euclid(24));
        }
        api.transaction(steps).await?;
    }
    Ok(())
}

fn print_curl_lines(settings: &Settings, pipeline: &[String; 2]) {
    let Settings { url, token_file, .. } = settings;
    let auth = format!("-H \"Authorization: Bearer $(cat '{token_file}')\"");
    println!("\nThe server goes on, and so does the live query. Try, in another terminal:\n");
    println!(
        "  curl -s {auth} -H 'Content-Type: application/sql' {url}/v1/sql \\\n    -d \"SELECT carrier, count(*) AS \
         flights, avg(dep_delay) AS delay FROM flights GROUP BY carrier ORDER BY delay DESC\"\n"
    );
    println!(
        "  curl -sNG {auth} {url}/v1/live \\\n    --data-urlencode \"sql=SELECT * FROM flights WHERE origin = 'LGA' AND \
         id > 100000\" \\\n    --data-urlencode 'plugin=late:{{\"minutes\":120}}' --data-urlencode 'plugin={}'\n",
        pipeline[1]
    );
    // The same module again would change nothing.
    println!(
        "  # after a change to plugins/late/src/lib.rs, at the top of the repository: the streams go on through it\n  sh \
         plugins/build.sh plugins/late && curl -s {auth} {url}/v1/plugins/late -T late.wasm\n"
    );
    println!("Ctrl-C ends it.");
}
