-- All that the transport keeps in a database. It is made when a broker first connects, or beforehand:
-- psql -c 'CREATE SCHEMA diator' -c 'SET search_path = diator' -f schema.sql

CREATE TABLE IF NOT EXISTS groups (
    topic text,
    grp text,
    expires timestamptz,  -- only of a subscription without a group: by then it has shown a sign of life, or is gone
    PRIMARY KEY (topic, grp)
);

-- One row for each group that a message goes to, until the group is done with it.
CREATE TABLE IF NOT EXISTS messages (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic text NOT NULL,
    grp text,  -- null: nobody was there, and the first group that comes takes it
    body bytea NOT NULL,
    headers json NOT NULL CHECK (json_typeof(headers) = 'object'),  -- jsonb has no room for \u0000
    attempt integer NOT NULL DEFAULT 0,
    due timestamptz NOT NULL DEFAULT '-infinity',  -- of what waits again: the end of its delay, or of its holder's lease
    holder uuid
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02);
CREATE INDEX IF NOT EXISTS messages_waiting ON messages (grp, due, id);

CREATE TABLE IF NOT EXISTS dead_letters (
    id bigint PRIMARY KEY,
    topic text NOT NULL,
    grp text NOT NULL,
    body bytea NOT NULL,
    headers json NOT NULL,  -- its own, and diator-dlq-…: why, and where from
    since timestamptz NOT NULL DEFAULT now()
);

-- Whoever founds a group waits for those who are sending, and they wait for him. So what is confirmed after the group
-- is there is in it. Each statement of a function sees what was committed before it began; those of a plain one do not.
CREATE OR REPLACE FUNCTION send(topics text[], bodies bytea[], all_headers text[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    LOCK TABLE groups IN ROW SHARE MODE;
    INSERT INTO messages (topic, grp, body, headers)
        SELECT sent.topic, groups.grp, sent.body, sent.headers::json
        FROM unnest(topics, bodies, all_headers) WITH ORDINALITY AS sent (topic, body, headers, position)
        LEFT JOIN groups ON groups.topic = sent.topic AND coalesce(expires > now(), true)
        ORDER BY position;
    PERFORM pg_notify(current_schema, grp) FROM groups WHERE topic = ANY (topics) GROUP BY grp;
END $$;

-- Whether the group was there. `kept` is null for one that stays.
CREATE OR REPLACE FUNCTION join_group(name text, topics text[], kept interval) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    missing text[];
BEGIN
    PERFORM drop_groups(array_agg(DISTINCT grp)) FROM groups WHERE expires < now();
    missing := ARRAY(SELECT unnest(topics) EXCEPT SELECT topic FROM groups WHERE grp = name);
    IF missing = '{}' THEN
        UPDATE groups SET expires = now() + kept WHERE grp = name AND kept IS NOT NULL;
        RETURN true;
    END IF;
    LOCK TABLE groups IN EXCLUSIVE MODE;  -- nothing above has locked more of it than reading does: no deadlock
    INSERT INTO groups SELECT topic, name, now() + kept FROM unnest(missing) AS topic ON CONFLICT DO NOTHING;
    IF kept IS NULL THEN
        UPDATE messages SET grp = name WHERE grp IS NULL AND topic = ANY (missing);
    END IF;
    RETURN false;
END $$;

CREATE OR REPLACE FUNCTION drop_groups(names text[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF names IS NOT NULL THEN
        DELETE FROM messages WHERE grp = ANY (names);  -- most of it while nobody has to wait
        LOCK TABLE groups IN EXCLUSIVE MODE;
        DELETE FROM groups WHERE grp = ANY (names);
        DELETE FROM messages WHERE grp = ANY (names);
    END IF;
END $$;
