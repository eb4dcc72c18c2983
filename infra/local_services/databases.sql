-- A role and a database each for Prefect and MLflow. Run at every start: what is right stays as it is.
\set ON_ERROR_STOP on
\getenv prefect_password PREFECT_DATABASE_PASSWORD
\getenv mlflow_password MLFLOW_DATABASE_PASSWORD

SELECT format('CREATE ROLE %I LOGIN', name)
FROM (VALUES ('prefect'), ('mlflow')) AS wanted (name)
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec

ALTER ROLE prefect PASSWORD :'prefect_password';
ALTER ROLE mlflow PASSWORD :'mlflow_password';

SELECT format('CREATE DATABASE %I OWNER %I', name, name)
FROM (VALUES ('prefect'), ('mlflow')) AS wanted (name)
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = name) \gexec

-- Neither may look into the other's.
REVOKE CONNECT ON DATABASE prefect, mlflow, postgres, template1 FROM PUBLIC;
